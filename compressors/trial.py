"""Does a network run on what its schema allows? Asked before it is packed."""

import torch
from torch import nn

from compressors.batches import example
from compressors.contracts import DenseInput, Schema
from compressors.errors import ModelRefused
from compressors.step import rows_of_tables

ROWS = 8


def try_out(model: nn.Module, schema: Schema, path: str) -> None:
    """Score made-up rows, among them the highest id of every table.

    Args:
        model: the loaded network.
        schema: its inputs and output.
        path: its class, for the message.

    Raises:
        ModelRefused: its weights are not float32, it fails on inputs of this schema, or what it
            returns is not one finite score a row.
        NothingToCompress: an input names a table the network does not have.
    """
    other = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}
    if other:
        raise ModelRefused(
            f"{path} holds {', '.join(sorted(other))} weights; a bundle begins with float32. "
            f"Convert them with model.float() before saving."
        )
    rows_of_table = rows_of_tables(model, schema)
    inputs = example(schema, rows_of_table, ROWS)
    for item in schema.inputs:
        if not isinstance(item, DenseInput):
            inputs[item.name][-1:] = rows_of_table[item.table] - 1
    try:
        with torch.no_grad():
            score = model(**inputs)
    except Exception as fault:
        raise ModelRefused(
            f"{path} fails on made-up rows that its schema allows (any id below its table's "
            f"rows): {fault!r}. Correct the inputs in model.json, or the network."
        ) from fault
    shape = list(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
    if shape not in ([ROWS], [ROWS, 1]) or not bool(torch.isfinite(score).all()):
        raise ModelRefused(
            f"{path} must return one finite score a row, (rows,) or (rows, 1); on {ROWS} rows it "
            f"returned {shape}{'' if shape not in ([ROWS], [ROWS, 1]) else ' with NaN or inf'}."
        )
