"""Features that nothing reads: numbers of tables and of dense inputs whose weights are all zero.

They are reported, not cut: a table's width and a dense input's are numbers that the architecture
and the signature share with much else (``dimensions`` makes tables narrower).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import DenseInput, Signature
from compressors.core.batches import example
from compressors.core.modules.formats import PackedLinear
from compressors.core.units import Unit, table_rows

CHECK_ROWS = 64
OTHER = 3.7  # what a feature is changed by, beyond its usual numbers

Inputs = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]


def unread_features(module: nn.Module, signature: Signature) -> dict[str, tuple[int, ...]]:
    """By table, or dense input, the columns that decide nothing.

    A column is one if the layers that it reaches have only zeros for it, and if another number in
    its place changes no score of made-up rows: it may reach them past all layers.

    Args:
        module: in evaluation mode; left as it is.
        signature: of its inputs.
    """
    if not any(
        isinstance(part, nn.Linear) and not bool(part.weight.any(dim=0).all())
        for part in module.modules()
    ):
        return {}  # every layer reads all that it is given
    found = {}
    rows = table_rows(module)
    for name, width, changed in _features(module, signature):
        unread = [
            column
            for column, is_read in enumerate(_reads(module, signature, rows, width, changed))
            if not is_read and _same(module, signature, rows, changed, column)
        ]
        if unread:
            found[name] = tuple(unread)
    return found


Changed = Callable[[Inputs, Change, ExitStack], Inputs]
"""Inputs in which one feature is changed; a table's, by a hook that the stack takes off again."""


def _features(module: nn.Module, signature: Signature) -> Iterator[tuple[str, int, Changed]]:
    """Every table and dense input, with its width."""
    for item in signature.inputs:
        if isinstance(item, DenseInput) and len(item.shape) == 1:
            name = item.name

            def given(inputs: Inputs, change: Change, _: ExitStack, name: str = name) -> Inputs:
                return {**inputs, name: change(inputs[name])}

            yield name, item.shape[0], given
    for unit in Unit.of(module):
        if unit.role != "table" or unit.part_of is not None:
            continue
        table = module.get_submodule(unit.name)
        width = getattr(table, "embedding_dim", None)
        if not isinstance(width, int):  # packed, or composed
            continue

        def looked_up(
            inputs: Inputs, change: Change, hooks: ExitStack, table: nn.Module = table
        ) -> Inputs:
            def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
                return change(output)

            hooks.callback(table.register_forward_hook(hook).remove)
            return inputs

        yield unit.name, width, looked_up


@torch.no_grad()
def _reads(
    module: nn.Module, signature: Signature, rows: dict[str, int], width: int, changed: Changed
) -> list[bool]:
    """Whether a NaN in each column meets a weight other than zero: a row a column."""
    met = torch.zeros(width, dtype=torch.bool)

    def mark(x: Tensor) -> Tensor:
        if len(x) != width:
            met[:] = True  # a table that is not read a row a row: nothing is known
            return x
        each = torch.arange(width)
        marked = x.clone()
        marked[each, ..., each] = torch.nan
        return marked

    def reading(
        part: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        x = args[0] if args else named["input"]
        if len(x) != width or isinstance(part, PackedLinear):
            met.logical_or_(x.isnan().any())
        elif isinstance(part, nn.Linear):
            seen = x.isnan().reshape(width, -1, x.shape[-1]).any(dim=1)  # (columns, inputs)
            met.logical_or_((seen & part.weight.any(dim=0)).any(dim=1))
        return output.nan_to_num(nan=0.0)  # a product cuts the trace off

    with ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, nn.Linear | PackedLinear):
                hooks.callback(part.register_forward_hook(reading, with_kwargs=True).remove)
        module(**changed(example(signature, rows, width), mark, hooks))
    return [bool(column) for column in met]


@torch.no_grad()
def _same(
    module: nn.Module, signature: Signature, rows: dict[str, int], changed: Changed, column: int
) -> bool:
    """Whether scores stay what they are with other numbers in a column."""

    def shift(x: Tensor) -> Tensor:
        other = x.clone()
        other[..., column] = OTHER - 2 * other[..., column]
        return other

    before = module(**example(signature, rows, CHECK_ROWS))
    with ExitStack() as hooks:
        after = module(**changed(example(signature, rows, CHECK_ROWS), shift, hooks))
    return torch.equal(before, after)
