"""Encode one table in blocks of rows.

``encode_table`` encodes in memory; ``compressors/quantize/table_stream.py`` uses ``TableEncoder``
to encode from file to file. The stored bytes do not depend on the number of rows per block: the
format's layout determines the position of each row, and rows of two blocks share no stored number,
such as a scale.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from compressors.core.modules.formats import (
    PackedTable,
    TensorSpec,
    find_stored_entries,
    row_blocks,
)
from compressors.core.state.tensor_files import TensorFile
from compressors.core.steps.step import TableStep
from compressors.errors.compression import ContractBroken

BLOCK_ROWS = 65_536
"""Rows that ``encode_table`` encodes at once."""


class TableEncoder:
    """Encodes the rows of one table in any order; the constructor fits the step to the table.

    Args:
        step: the method and its settings.
        weight: float ``(rows, dim)``, may be memory-mapped.

    Raises:
        CompressionError: the step cannot be applied to this table.
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
            ContractBroken: ``fit`` did not return one of them, or returned another dtype.
        """
        names = [name for name, spec in self.layout.items() if not spec.rows_per_entry]
        if missing := [name for name in names if name not in self._params]:
            raise ContractBroken("fit_incomplete", step=self._step.kind, name=missing[0])
        return {name: self._require_expected_dtype(name, self._params[name]) for name in names}

    def encode(self, block: Tensor, begin: int) -> dict[str, tuple[slice, Tensor]]:
        """Encode a block of rows, float ``(rows of the block, dim)``.

        Args:
            block: the rows.
            begin: the number of the block's first row in the table.

        Returns:
            By the name of each stored tensor of rows: which entries of its first dimension encode
            the block, and their values. An entry may cover several rows, such as a shared scale.

        Raises:
            ContractBroken: names, dtypes or numbers of entries differ from the layout.
        """
        encoded = self._step.encode(block, self._params)
        expected = {name for name, spec in self.layout.items() if spec.rows_per_entry}
        if encoded.keys() != expected:
            raise ContractBroken(
                "encoded_names_differ",
                step=self._step.kind,
                got=tuple(sorted(encoded)),
                expected=tuple(sorted(expected)),
            )
        entries_and_values = {}
        for name, values in encoded.items():
            end = begin + len(block)
            entries = find_stored_entries(self.layout[name], begin, end)
            if len(values) != entries.stop - entries.start:
                raise ContractBroken(
                    "encoded_rows_differ",
                    step=self._step.kind,
                    name=name,
                    begin=begin,
                    end=end,
                    got=len(values),
                    expected=entries.stop - entries.start,
                )
            entries_and_values[name] = entries, self._require_expected_dtype(name, values)
        return entries_and_values

    def _require_expected_dtype(self, name: str, values: Tensor) -> Tensor:
        """Return the values; raise ``ContractBroken`` if their dtype differs from the layout."""
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


def encode_table(step: TableStep, weight: Tensor, file: TensorFile | None = None) -> PackedTable:
    """Encode a table, float ``(rows, dim)``, in the step's format.

    Args:
        step: the method and its settings.
        weight: the table.
        file: a file that holds ``weight``. Its rows are then read block by block: pages of a mapped
            tensor would count as memory of this process.

    Raises:
        ContractBroken: the encoded tensors differ from the format's layout.
        CompressionError: the step cannot be applied to this table.
    """
    encoder = TableEncoder(step, weight)
    stored = {
        name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in encoder.layout.items()
    }
    for name, values in encoder.whole().items():
        stored[name].copy_(values)
    with nullcontext() if file is None else file.rows() as rows:
        for begin, end in row_blocks(encoder.layout, encoder.rows, BLOCK_ROWS):
            block = weight[begin:end] if rows is None else rows.read(begin, end)
            for name, (entries, values) in encoder.encode(block, begin).items():
                stored[name][entries] = values
    return PackedTable(step.storage, encoder.rows, encoder.dim, step.settings(), stored)
