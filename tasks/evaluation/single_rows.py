"""Take one row of a batch, and format it for messages. No Prefect."""

from collections.abc import Mapping

import torch
from torch import Tensor

from compressors.contracts import AnyInput, JaggedBag, Signature, tensor_names
from compressors.core.batches import build_jagged_arguments

MAX_SHOWN_VALUES = 8
"""Largest number of values of one list that ``format_row`` shows."""


def take_row(inputs: Mapping[str, Tensor], signature: Signature, row: int) -> dict[str, Tensor]:
    """Return the inputs of row number ``row`` of a batch, as a batch of one row."""
    row_inputs: dict[str, Tensor] = {}
    for item in signature.model_inputs:
        if not isinstance(item, JaggedBag):
            names = tensor_names(item)
            row_inputs.update((name, inputs[name][row : row + 1]) for name in names)
            continue
        # A jagged input is a tensor of all lists' values and the offset or length of each list.
        values, second = (inputs[name] for name in tensor_names(item))
        begin = second if item.layout == "offsets" else second.cumsum(0) - second
        edges = torch.cat([begin, begin.new_full((1,), len(values))])
        row_values = values[int(edges[row]) : int(edges[row + 1])]
        bounds = torch.tensor([0, len(row_values)], dtype=second.dtype)
        row_inputs.update(build_jagged_arguments(item, row_values, bounds))
    return row_inputs


def format_row(inputs: Mapping[str, Tensor], signature: Signature) -> dict[str, str]:
    """Format the inputs of a batch of one row, by input name; long lists are shortened."""
    return {item.name: _format(inputs[item.name], item) for item in signature.model_inputs}


def _format(values: Tensor, item: AnyInput) -> str:
    flat = values.reshape(-1).tolist()
    texts = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in flat]
    if len(texts) == 1 and not isinstance(item, JaggedBag) and not item.shape:
        return texts[0]
    if len(texts) > MAX_SHOWN_VALUES:
        return f"[{', '.join(texts[:MAX_SHOWN_VALUES])}, ... {len(texts)} values]"
    return f"[{', '.join(texts)}]"
