"""Read prepared data as batches of model inputs.

A prepared split is a folder with one ``data.safetensors``: a tensor per input under the input's
name, ``@label``, and ``@group`` and ``@time`` if the signature names them. A matrix, one input with
several fields as its columns, has a tensor per field, under the field's name. With several outputs,
``@label`` has a column for each. A ragged input (a jagged bag, a sequence or tokens) has a list of
ids per row, whose length differs between rows. It is stored as the concatenated ids and
``@bounds/<name>``, int64 ``(rows + 1,)``: row ``r`` has the ids from ``bounds[r]`` to
``bounds[r + 1] - 1``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from compressors.contracts import (
    RAGGED,
    DataInput,
    DenseInput,
    JaggedBag,
    MatrixInput,
    SequenceInput,
    Signature,
    Split,
    TokensInput,
    tensor_names,
)

MAX_TOKENS = 2**14
"""Largest number of tokens of a batch of texts, padding included.

An encoder's activations are large: 1,024 texts of 256 tokens and 1,536 channels take 1.6 GB.
"""

MAX_SEQUENCE_IDS = 2**20
"""Largest number of ids of a batch of sequences, padding included: 8,192 lists of 128 ids."""


@dataclass(frozen=True)
class SampledItems:
    """Items that were drawn from the catalogue for a batch of a retrieval model.

    Attributes:
        inputs: the inputs of the item tower, by name.
        item: id of each item, each once, int ``(sampled,)``.
        item_log_share: logarithm of the share of training rows that have the item, for the logQ
            correction of the loss, float32 ``(sampled,)``; -inf if none has it.
        drawn_share: share of the catalogue that was drawn.
    """

    inputs: dict[str, Tensor]
    item: Tensor
    item_log_share: Tensor
    drawn_share: float


@dataclass(frozen=True)
class Batch:
    """A batch of rows.

    Attributes:
        inputs: keyword arguments of the model's forward method.
        label: float ``(rows,)``, or ``(rows, outputs)`` for several outputs; NaN where a row has no
            label.
        group: int ``(rows,)``; None if the signature names no group.
        output_weights: factors of the losses of the outputs, in addition to ``loss_weight``; None
            for 1.
        item: id of the row's item, int ``(rows,)``; None if the signature names no item.
        item_log_share: logarithm of the share of rows that have this item, float32 ``(rows,)``.
        sampled: further items, which are negatives of all queries; None if none are drawn.
    """

    inputs: dict[str, Tensor]
    label: Tensor
    group: Tensor | None
    output_weights: tuple[float, ...] | None = None
    item: Tensor | None = None
    item_log_share: Tensor | None = None
    sampled: SampledItems | None = None


def batches(
    split: Split, signature: Signature, size: int, limit: int | None = None
) -> Iterator[Batch]:
    """Yield batches of up to ``size`` rows in stored order, from the first ``limit`` rows.

    Batches of texts and long sequences have fewer rows, see ``rows_per_batch``. Reads only the rows
    it yields: the file is memory-mapped and sliced.
    """
    rows = split.rows if limit is None else min(limit, split.rows)
    size = rows_per_batch(signature, size)
    with safe_open(Path(split.path) / "data.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        bounds = {
            item.name: file.get_tensor(bounds_name(item))
            for item in signature.data_inputs
            if isinstance(item, RAGGED)
        }
        for begin in range(0, rows, size):
            end = min(begin + size, rows)
            data: dict[str, Tensor] = {}
            for item in signature.data_inputs:
                if isinstance(item, RAGGED):
                    edges = bounds[item.name][begin : end + 1]
                    values = slices[item.name][int(edges[0]) : int(edges[-1])]
                    data[item.name] = values
                    data[bounds_name(item)] = edges - edges[0]
                else:
                    data[item.name] = slices[item.name][begin:end]
            group = slices["@group"][begin:end] if "@group" in slices else None
            yield Batch(model_inputs(data, signature), slices["@label"][begin:end], group)


def rows_per_batch(signature: Signature, most: int) -> int:
    """Return the number of rows per batch: ``most``, or fewer for texts and long sequences.

    A batch must be within ``MAX_TOKENS`` and ``MAX_SEQUENCE_IDS`` even if every text and sequence
    has the longest length.
    """
    tokens = ids = 0
    for item in signature.inputs:
        if isinstance(item, TokensInput):
            tokens += item.shape[0]
        elif isinstance(item, SequenceInput) and item.is_dynamic:
            ids += item.shape[0]
    limits = [MAX_TOKENS // tokens] if tokens else []
    limits += [MAX_SEQUENCE_IDS // ids] if ids else []
    return max(1, min([most, *limits]))


class Rows:
    """A prepared split with random access to its rows.

    The file is memory-mapped, so only the rows of a batch are read. ``label`` and ``group`` are
    those of all rows, as in ``Batch``.
    """

    def __init__(self, split: Split, signature: Signature) -> None:
        with safe_open(Path(split.path) / "data.safetensors", framework="pt") as file:
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.signature = signature
        self.label = self._tensors["@label"]
        self.group = self._tensors.get("@group")
        self.item = None if signature.item is None else self._tensors.get(signature.item)

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def item_log_share(self) -> Tensor | None:
        """Logarithm of the share of all rows that have the row's item, float32 ``(rows,)``."""
        if self.item is None:
            return None
        _, item, counts = torch.unique(self.item, return_inverse=True, return_counts=True)
        share: Tensor = counts[item] / len(self)
        return share.log()

    def lengths(self) -> Tensor | None:
        """Return the length of the longest sequence of each row, int64 ``(rows,)``.

        None if the network reads no sequence of dynamic length.
        """
        lengths = [
            self._tensors[bounds_name(item)].diff()
            for item in self.signature.data_inputs
            if isinstance(item, SequenceInput) and item.is_dynamic
        ]
        return torch.stack(lengths).amax(dim=0) if lengths else None

    def order_rows(self, rows: Tensor) -> Tensor:
        """Return the row numbers unchanged, because ``take`` accepts any order."""
        return rows

    def take(self, rows: Tensor) -> Batch:
        """Return the rows with these numbers, int64 ``(batch,)``, as a batch."""
        data: dict[str, Tensor] = {}
        for item in self.signature.data_inputs:
            values = self._tensors[item.name]
            if not isinstance(item, RAGGED):
                data[item.name] = values[rows]
                continue
            bounds = self._tensors[bounds_name(item)]
            begin, length = bounds[rows], bounds[rows + 1] - bounds[rows]  # (batch,)
            edges = torch.cat([length.new_zeros(1), length.cumsum(0)])  # (batch + 1,)
            # Shift from an id's position in the batch to its position in the file.
            shift = torch.repeat_interleave(begin - edges[:-1], length)  # (all ids,)
            data[item.name] = values[torch.arange(int(edges[-1])) + shift]
            data[bounds_name(item)] = edges
        group, item_id, share = (
            None if values is None else values[rows]
            for values in (self.group, self.item, self.item_log_share)
        )
        return Batch(
            model_inputs(data, self.signature),
            self.label[rows],
            group,
            item=item_id,
            item_log_share=share,
        )

    def column(self, name: str) -> Tensor:
        """Return the values of one input of the data for all rows, ``(rows, *shape)``."""
        values: Tensor = self._tensors[name]
        return values


class JoinedRows:
    """Labelled rows followed by rows of logged traffic (requests without labels), as one set.

    A row of traffic has the label NaN. Groups are renumbered so that traffic and labelled rows
    share no group; if only one of them has groups, ``group`` is None. Only labels and groups are
    copied in memory; inputs are read from the memory-mapped files.
    """

    def __init__(self, labelled: Rows | None, traffic: Rows) -> None:
        self._parts = [traffic] if labelled is None else [labelled, traffic]
        self._labelled_rows = 0 if labelled is None else len(labelled)
        unknown = torch.full_like(traffic.label, torch.nan, dtype=torch.float32)
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

    def lengths(self) -> Tensor | None:
        """Return the length of the longest sequence of each row, as ``Rows.lengths``."""
        lengths = [item for part in self._parts if (item := part.lengths()) is not None]
        return torch.cat(lengths) if lengths else None

    def take(self, rows: Tensor) -> Batch:
        """Return the rows with these numbers, int64 ``(batch,)``, as a batch.

        The numbers of labelled rows must precede those of traffic, as ``order_rows`` returns them.
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

    def order_rows(self, rows: Tensor) -> Tensor:
        """Return the row numbers in an order that ``take`` accepts: labelled rows first."""
        labelled = rows < self._labelled_rows
        return torch.cat([rows[labelled], rows[~labelled]])


def bounds_name(item: DataInput) -> str:
    """Return the name of the tensor with the bounds of the lists of a ragged input."""
    return f"@bounds/{item.name}"


def model_inputs(data: Mapping[str, Tensor], signature: Signature) -> dict[str, Tensor]:
    """Return the arguments of a model's forward method for some rows of the data.

    Lists of ragged inputs become the tensors of the input's kind, and the fields of a matrix become
    the matrix. Keys, ids that only identify an item, are left out: no model receives them.

    Args:
        data: the tensors of the rows by name, in the layout of the module's docstring.
        signature: the model's signature.
    """
    inputs: dict[str, Tensor] = {}
    for item in signature.model_inputs:
        if isinstance(item, MatrixInput):
            fields = [data[field.name] for field in item.fields]
            dtype = getattr(torch, item.dtype)
            columns = [field.reshape(len(field), -1).to(dtype) for field in fields]
            inputs[item.name] = torch.cat(columns, dim=1)
        elif isinstance(item, JaggedBag):
            inputs.update(build_jagged_arguments(item, data[item.name], data[bounds_name(item)]))
        elif isinstance(item, SequenceInput):
            inputs.update(pad_sequence(item, data[item.name], data[bounds_name(item)]))
        else:
            inputs[item.name] = data[item.name]
    return inputs


class DenseColumns(NamedTuple):
    """A dense vector among a model's inputs: ``columns`` of the input tensor ``tensor``.

    ``name`` is the name of the dense input, or of the field of a matrix.
    """

    name: str
    tensor: str
    columns: slice


def dense_columns(signature: Signature) -> tuple[DenseColumns, ...]:
    """Return the dense vectors of a model's inputs: dense inputs, and dense fields of matrices."""
    result = []
    for item in signature.model_inputs:
        if isinstance(item, DenseInput):
            result.append(DenseColumns(item.name, item.name, slice(0, item.shape[0])))
        elif isinstance(item, MatrixInput):
            result += [
                DenseColumns(field.name, item.name, columns)
                for field, columns in zip(item.fields, item.slices, strict=True)
                if isinstance(field, DenseInput)
            ]
    return tuple(result)


def change_columns(
    inputs: Mapping[str, Tensor], part: DenseColumns, change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return inputs in which ``change`` was applied to one dense vector, float ``(rows, width)``.

    The given tensors are not modified.
    """
    values = inputs[part.tensor]
    if part.columns == slice(0, values.shape[1]):
        return {**inputs, part.tensor: change(values)}
    changed = values.clone()
    changed[:, part.columns] = change(values[:, part.columns])
    return {**inputs, part.tensor: changed}


def concatenate_inputs(
    parts: Sequence[Mapping[str, Tensor]], signature: Signature
) -> dict[str, Tensor]:
    """Concatenate the inputs of several batches along the rows."""
    inputs: dict[str, Tensor] = {}
    for item in signature.model_inputs:
        names = tensor_names(item)
        tensors = [[part[name] for part in parts] for name in names]
        if isinstance(item, SequenceInput):
            inputs.update(zip(names, _concatenate_sequences(item, tensors), strict=True))
            continue
        if isinstance(item, JaggedBag) and item.layout == "offsets":
            counts = torch.tensor([0, *(len(values) for values in tensors[0])]).cumsum(0)
            tensors[1] = [
                offsets + int(begin) for offsets, begin in zip(tensors[1], counts, strict=False)
            ]
        inputs.update(
            (name, torch.cat(pieces)) for name, pieces in zip(names, tensors, strict=True)
        )
    return inputs


def pad_sequence(item: SequenceInput, values: Tensor, bounds: Tensor) -> dict[str, Tensor]:
    """Build a sequence's forward arguments, padded to the longest list of the rows.

    Args:
        item: the input.
        values: the ids of all rows, one after another, int ``(ids,)``.
        bounds: int64 ``(rows + 1,)``: row ``r`` has the ids from ``bounds[r]`` to
            ``bounds[r + 1] - 1``.
    """
    lengths = bounds.diff()  # (rows,)
    length = max(item.shortest, int(lengths.max())) if len(lengths) else item.shortest
    column = torch.arange(length, device=values.device)
    position = column.expand(len(lengths), length)  # of each entry in its row's list
    if item.padding == "left":
        position = position - (length - lengths)[:, None]
        is_id = position >= 0
    else:
        is_id = position < lengths[:, None]
    ids = values.new_full((len(lengths), length), item.padding_id)
    ids[is_id] = values
    tensors = [ids]
    if item.mask is not None:
        tensors.append(is_id.to(getattr(torch, item.mask_dtype)))
    if item.lengths is not None:
        tensors.append(lengths)
    if item.positions is not None:
        tensors.append(torch.where(is_id, position + item.first_position, 0))
    if isinstance(item, TokensInput) and item.token_types is not None:
        tensors.append(torch.zeros(ids.shape, dtype=torch.int64, device=ids.device))
    return dict(zip(tensor_names(item), tensors, strict=True))


def _concatenate_sequences(item: SequenceInput, tensors: list[list[Tensor]]) -> list[Tensor]:
    """Concatenate the tensors of a sequence of several batches, padded to the longest batch.

    ``tensors`` has a list for each tensor of the input, with one tensor per batch.
    """
    length = max(ids.shape[1] for ids in tensors[0])
    result = []
    for number, pieces in enumerate(tensors):
        padded = []
        for piece in pieces:
            if piece.dim() == 1:  # the lengths
                padded.append(piece)
                continue
            missing = length - piece.shape[1]
            sides = (missing, 0) if item.padding == "left" else (0, missing)
            padding = item.padding_id if number == 0 else 0
            padded.append(torch.nn.functional.pad(piece, sides, value=padding))
        result.append(torch.cat(padded))
    return result


def build_jagged_arguments(item: JaggedBag, values: Tensor, bounds: Tensor) -> dict[str, Tensor]:
    """Build a jagged bag's two forward arguments from its ids and bounds ``(rows + 1,)``.

    The first argument is ``values``, the ids of all rows. The second has ``rows`` entries: the
    offset of each row's first id or the number of its ids, as ``item.layout`` says.
    """
    second = bounds[:-1] if item.layout == "offsets" else bounds.diff()
    return dict(zip(tensor_names(item), (values, second), strict=True))
