"""The encoder of one table, block by block: in memory here, from file to file in table_stream.py.

The stored bytes do not depend on the number of rows of a block: a row's place follows from the
format's layout, and no stored entry belongs to rows of two blocks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressors.core.modules.formats import PackedTable, TensorSpec, blocks, entries
from compressors.core.steps.step import TableStep
from compressors.errors.compression import ContractBroken

BLOCK_ROWS = 65_536


class TableEncoder:
    """Encodes the rows of one table in any order; the constructor fits the step to the table.

    Args:
        step: the method and its settings.
        weight: float ``(rows, dim)``, may be memory-mapped.

    Raises:
        CompressionError: the step cannot be carried out on this table.
    """

    def __init__(self, step: TableStep, weight: Tensor) -> None:
        self._step = step
        self.rows, self.dim = weight.shape
        self.layout: Mapping[str, TensorSpec] = step.storage.layout(
            self.rows, self.dim, step.settings()
        )
        self._params = step.fit(weight)

    def whole(self) -> dict[str, Tensor]:
        """Return the stored tensors of the whole table, such as a codebook.

        Raises:
            ContractBroken: the step did not fit one of them, or in another dtype.
        """
        names = [name for name, spec in self.layout.items() if not spec.every]
        if missing := [name for name in names if name not in self._params]:
            raise ContractBroken("fit_incomplete", step=self._step.kind, name=missing[0])
        return {name: self._checked(name, self._params[name]) for name in names}

    def encode(self, block: Tensor, begin: int) -> dict[str, tuple[slice, Tensor]]:
        """Encode the rows from ``begin`` on, float ``(rows of the block, dim)``.

        Returns:
            For every stored tensor of rows, its entries of these rows and their values.

        Raises:
            ContractBroken: names, dtypes or numbers of entries differ from the layout.
        """
        encoded = self._step.encode(block, self._params)
        expected = {name for name, spec in self.layout.items() if spec.every}
        if encoded.keys() != expected:
            raise ContractBroken(
                "encoded_names_differ",
                step=self._step.kind,
                got=tuple(sorted(encoded)),
                expected=tuple(sorted(expected)),
            )
        placed = {}
        for name, values in encoded.items():
            end = begin + len(block)
            place = entries(self.layout[name], begin, end)
            if len(values) != place.stop - place.start:
                raise ContractBroken(
                    "encoded_rows_differ",
                    step=self._step.kind,
                    name=name,
                    begin=begin,
                    end=end,
                    got=len(values),
                    expected=place.stop - place.start,
                )
            placed[name] = place, self._checked(name, values)
        return placed

    def _checked(self, name: str, values: Tensor) -> Tensor:
        spec = self.layout[name]
        if values.dtype != spec.dtype:
            raise ContractBroken(
                "encoded_dtype_differs",
                step=self._step.kind,
                name=name,
                got=str(values.dtype),
                expected=str(spec.dtype),
            )
        return values


def encode_table(step: TableStep, weight: Tensor) -> PackedTable:
    """Encode a table, float ``(rows, dim)``, in the step's format.

    Raises:
        ContractBroken: the step encodes other tensors than its layout says.
        CompressionError: the step cannot be carried out on this table.
    """
    encoder = TableEncoder(step, weight)
    stored = {
        name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in encoder.layout.items()
    }
    for name, values in encoder.whole().items():
        stored[name].copy_(values)
    for begin, end in blocks(encoder.layout, encoder.rows, BLOCK_ROWS):
        for name, (place, values) in encoder.encode(weight[begin:end], begin).items():
            stored[name][place] = values
    return PackedTable(step.storage, encoder.rows, encoder.dim, step.settings(), stored)
