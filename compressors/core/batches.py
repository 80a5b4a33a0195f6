"""Read prepared data as batches of model inputs, and generate random inputs.

A prepared split is a folder with one ``data.safetensors``: a tensor per input under the input's
name, ``@label``, and ``@group`` and ``@time`` if the signature names them. A jagged bag (a list of
ids whose length differs between rows) is stored as the concatenated ids and ``@bounds/<name>``,
int64 ``(rows + 1,)``: row ``r`` has the ids from ``bounds[r]`` to ``bounds[r + 1] - 1``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compressors.contracts import (
    AnyInput,
    DenseInput,
    IdInput,
    JaggedBag,
    PaddedBag,
    Signature,
    Split,
    tensor_names,
)

MAX_SHOWN_VALUES = 8
"""Largest number of values of one list that ``format_row`` shows."""


@dataclass(frozen=True)
class Batch:
    """A batch of rows.

    Attributes:
        inputs: keyword arguments of the model's forward method.
        label: float ``(rows,)``.
        group: int ``(rows,)``; None if the signature names no group.
    """

    inputs: dict[str, Tensor]
    label: Tensor
    group: Tensor | None


def batches(
    split: Split, signature: Signature, size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Yield batches of up to ``size`` rows in stored order, from the first ``limit`` rows.

    Reads only the rows it yields: the file is memory-mapped and sliced.
    """
    rows = split.rows if limit is None else min(limit, split.rows)
    with safe_open(Path(split.path) / "data.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        bounds = {
            item.name: file.get_tensor(f"@bounds/{item.name}")
            for item in signature.inputs
            if isinstance(item, JaggedBag)
        }
        for begin in range(0, rows, size):
            end = min(begin + size, rows)
            inputs: dict[str, Tensor] = {}
            for item in signature.inputs:
                if isinstance(item, JaggedBag):
                    edges = bounds[item.name][begin : end + 1]
                    values = slices[item.name][int(edges[0]) : int(edges[-1])]
                    inputs.update(jagged(item, values, edges - edges[0]))
                else:
                    inputs[item.name] = slices[item.name][begin:end]
            group = slices["@group"][begin:end] if "@group" in slices else None
            yield Batch(inputs, slices["@label"][begin:end], group)


class Rows:
    """A prepared split with random access to its rows.

    The file is memory-mapped, so only the rows of a batch are read. ``label`` is float ``(rows,)``,
    ``group`` int ``(rows,)`` or None.
    """

    def __init__(self, split: Split, signature: Signature) -> None:
        with safe_open(Path(split.path) / "data.safetensors", framework="pt") as file:
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.signature = signature
        self.label = self._tensors["@label"]
        self.group = self._tensors.get("@group")

    def __len__(self) -> int:
        return len(self.label)

    def in_order(self, rows: Tensor) -> Tensor:
        """Return the row numbers in an order that ``take`` accepts: unchanged, it accepts any."""
        return rows

    def take(self, rows: Tensor) -> Batch:
        """Return the rows with these numbers, int64 ``(batch,)``, as a batch."""
        inputs: dict[str, Tensor] = {}
        for item in self.signature.inputs:
            values = self._tensors[item.name]
            if not isinstance(item, JaggedBag):
                inputs[item.name] = values[rows]
                continue
            bounds = self._tensors[f"@bounds/{item.name}"]
            begin, length = bounds[rows], bounds[rows + 1] - bounds[rows]  # (batch,)
            edges = torch.cat([length.new_zeros(1), length.cumsum(0)])  # (batch + 1,)
            # Shift from an id's position in the batch to its position in the file.
            shift = torch.repeat_interleave(begin - edges[:-1], length)  # (all ids,)
            inputs.update(jagged(item, values[torch.arange(int(edges[-1])) + shift], edges))
        return Batch(inputs, self.label[rows], None if self.group is None else self.group[rows])


class JoinedRows:
    """Labelled rows followed by rows of logged traffic (requests without labels), as one set.

    A row of traffic has the label NaN. Groups are renumbered so that traffic and labelled rows
    share no group; if only one of them has groups, ``group`` is None. Only labels and groups are
    copied in memory; inputs are read from the memory-mapped files.
    """

    def __init__(self, labelled: Rows | None, traffic: Rows) -> None:
        self._parts = [traffic] if labelled is None else [labelled, traffic]
        self._labelled_rows = 0 if labelled is None else len(labelled)
        unknown = torch.full((len(traffic),), torch.nan, dtype=torch.float32)
        known = [] if labelled is None else [labelled.label.to(torch.float32)]
        self.label = torch.cat([*known, unknown])
        groups = [part.group for part in self._parts if part.group is not None]
        self.group: Tensor | None = None
        if len(groups) == len(self._parts):
            numbered = [torch.unique(group, return_inverse=True)[1] for group in groups]
            begin = int(numbered[0].max()) + 1
            self.group = torch.cat([numbered[0], *(part + begin for part in numbered[1:])])

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor) -> Batch:
        """Return the rows with these numbers, int64 ``(batch,)``, as a batch.

        The numbers of labelled rows must precede those of traffic, as ``in_order`` returns them.
        """
        labelled = rows < self._labelled_rows
        by_part = [rows[labelled], rows[~labelled] - self._labelled_rows]
        batches_by_part = [
            part.take(part_rows)
            for part, part_rows in zip(self._parts, by_part[-len(self._parts) :], strict=True)
            if len(part_rows)
        ]
        group = None if self.group is None else self.group[rows]
        signature = self._parts[0].signature
        return Batch(
            concatenate_inputs([part.inputs for part in batches_by_part], signature),
            self.label[rows],
            group,
        )

    def in_order(self, rows: Tensor) -> Tensor:
        """Return the row numbers in an order that ``take`` accepts: labelled rows first."""
        labelled = rows < self._labelled_rows
        return torch.cat([rows[labelled], rows[~labelled]])


def concatenate_inputs(
    parts: Sequence[dict[str, Tensor]], signature: Signature
) -> dict[str, Tensor]:
    """Concatenate the inputs of several batches along the rows."""
    inputs: dict[str, Tensor] = {}
    for item in signature.inputs:
        names = tensor_names(item)
        tensors = [[part[name] for part in parts] for name in names]
        if isinstance(item, JaggedBag) and item.layout == "offsets":
            counts = torch.tensor([0, *(len(values) for values in tensors[0])]).cumsum(0)
            tensors[1] = [
                offsets + int(begin) for offsets, begin in zip(tensors[1], counts, strict=False)
            ]
        inputs.update(
            (name, torch.cat(pieces)) for name, pieces in zip(names, tensors, strict=True)
        )
    return inputs


def row_of(inputs: Mapping[str, Tensor], signature: Signature, row: int) -> dict[str, Tensor]:
    """Return the inputs of row number ``row`` of a batch, as a batch of one row."""
    row_inputs: dict[str, Tensor] = {}
    for item in signature.inputs:
        if not isinstance(item, JaggedBag):
            row_inputs[item.name] = inputs[item.name][row : row + 1]
            continue
        values, second = (inputs[name] for name in tensor_names(item))
        begin = second if item.layout == "offsets" else second.cumsum(0) - second
        edges = torch.cat([begin, begin.new_full((1,), len(values))])
        row_values = values[int(edges[row]) : int(edges[row + 1])]
        bounds = torch.tensor([0, len(row_values)], dtype=second.dtype)
        row_inputs.update(jagged(item, row_values, bounds))
    return row_inputs


def format_row(inputs: Mapping[str, Tensor], signature: Signature) -> dict[str, str]:
    """Format the inputs of a batch of one row, by input name; long lists are shortened."""
    return {item.name: _format(inputs[item.name], item) for item in signature.inputs}


def _format(values: Tensor, item: AnyInput) -> str:
    flat = values.reshape(-1).tolist()
    texts = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in flat]
    if len(texts) == 1 and not isinstance(item, JaggedBag) and not item.shape:
        return texts[0]
    if len(texts) > MAX_SHOWN_VALUES:
        return f"[{', '.join(texts[:MAX_SHOWN_VALUES])}, ... {len(texts)} values]"
    return f"[{', '.join(texts)}]"


def jagged(item: JaggedBag, values: Tensor, bounds: Tensor) -> dict[str, Tensor]:
    """Build a jagged bag's two forward arguments from its ids and bounds ``(rows + 1,)``.

    The first argument is ``values``, the ids of all rows. The second has ``rows`` entries: the
    offset of each row's first id or the number of its ids, as ``item.layout`` says.
    """
    second = bounds[:-1] if item.layout == "offsets" else bounds.diff()
    return dict(zip(tensor_names(item), (values, second), strict=True))


def generate_inputs(
    signature: Signature, rows_of_table: dict[str, int], rows: int, seed: int = 0
) -> dict[str, Tensor]:
    """Generate random inputs with valid ids, on which a network or a step can be checked.

    Args:
        signature: describes the inputs to generate.
        rows_of_table: number of rows of each table, by name; ids are below it.
        rows: number of rows to generate.
        seed: seed of the random numbers.

    Returns:
        The inputs by the name of the model's forward argument. Lists have random lengths from 0 to
        the longest of the signature.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for item in signature.inputs:
        inputs.update(_generate_input(item, rows_of_table, rows, generator))
    return inputs


def _generate_input(
    item: AnyInput,
    rows_of_table: dict[str, int],
    rows: int,
    generator: torch.Generator,
    share: int | None = None,
) -> dict[str, Tensor]:
    """Generate one input; ``share`` sets the lengths of lists: 0 empty, 1 longest, None random."""
    if isinstance(item, DenseInput):
        return {item.name: torch.randn((rows, *item.shape), generator=generator)}
    high, dtype = rows_of_table[item.table], getattr(torch, item.dtype)
    if isinstance(item, IdInput | PaddedBag):
        ids = torch.randint(high, (rows, *item.shape), generator=generator, dtype=dtype)
        if isinstance(item, PaddedBag):
            lengths = _lengths(item, (rows, 1), generator, share)
            ids[torch.arange(item.shape[0]) >= lengths] = item.padding_id
        return {item.name: ids}
    lengths = _lengths(item, (rows,), generator, share)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randint(high, (int(bounds[-1]),), generator=generator, dtype=dtype)
    return jagged(item, values, bounds)


def _lengths(
    item: PaddedBag | JaggedBag,
    shape: tuple[int, ...],
    generator: torch.Generator,
    share: int | None,
) -> Tensor:
    """Return the length of each list, int64: random, or ``share`` (0 or 1) times the longest."""
    if share is not None:
        return torch.full(shape, share * item.shape[0])
    return torch.randint(item.shape[0] + 1, shape, generator=generator)


def generate_edge_inputs(
    signature: Signature, rows_of_table: dict[str, int], rows: int, seed: int = 1
) -> dict[str, Tensor]:
    """Generate inputs with ids below and above their table's range, to compare two graphs.

    A graph handles such ids by a policy, for example by refusing the row. Each row has out-of-range
    ids in at most one input: if the row is refused because of one input, the effect of another
    input cannot be observed. Two rows per input with ids are needed. If there are at least two
    more, all lists of the second-last row are empty, and all lists of the last row have the longest
    length.

    Raises:
        ValueError: ``rows`` is less than twice the number of inputs with ids.
    """
    with_ids = [item for item in signature.inputs if not isinstance(item, DenseInput)]
    shares = (0, 1) if rows >= 2 * len(with_ids) + 2 else ()
    inputs = generate_inputs(signature, rows_of_table, rows - len(shares), seed)
    if rows < 2 * len(with_ids):
        raise ValueError(f"{len(with_ids)} inputs need {2 * len(with_ids)} rows; found {rows}")
    for index, item in enumerate(with_ids):
        for row, bad_id in ((2 * index, -1), (2 * index + 1, rows_of_table[item.table])):
            _write_bad_id(item, inputs, row, bad_id)
    last_rows = [_row_with_lists(signature, rows_of_table, seed, share) for share in shares]
    return concatenate_inputs([inputs, *last_rows], signature)


def _row_with_lists(
    signature: Signature, rows_of_table: dict[str, int], seed: int, share: int
) -> dict[str, Tensor]:
    """Generate one row whose lists are all empty (share 0) or of the longest length (share 1)."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for item in signature.inputs:
        inputs.update(_generate_input(item, rows_of_table, 1, generator, share))
    return inputs


def _write_bad_id(item: AnyInput, inputs: dict[str, Tensor], row: int, bad_id: int) -> None:
    """Write an out-of-range id into one row: a negative one at a list's start, else at its end."""
    ids = inputs[item.name]
    if not isinstance(item, JaggedBag):
        ids[row].reshape(-1)[0 if bad_id < 0 else -1] = bad_id
        return
    second = inputs[tensor_names(item)[1]]
    begin = second if item.layout == "offsets" else second.cumsum(0) - second
    end = torch.cat([begin[1:], begin.new_full((1,), ids.shape[0])])
    if end[row] > begin[row]:  # an empty list has no position to write to
        ids[begin[row] if bad_id < 0 else end[row] - 1] = bad_id
