"""Find unread features: columns of tables and dense inputs to which only zero weights are applied.

They are reported, not removed: other parts of the architecture and the signature depend on the
width of a table or dense input. The step ``dimensions`` makes tables narrower.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.core.batches import DenseColumns, change_columns, dense_columns
from compressors.core.modules.formats import PackedLinear
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import call_network, network_scores
from compressors.core.units import Unit, table_rows

CHECK_ROWS = 64  # synthetic rows whose scores are compared
SHIFT = 3.7  # constant that moves a changed feature out of its usual range

Inputs = dict[str, Tensor]
"""A batch of inputs, by name of the model's forward argument."""
Change = Callable[[Tensor], Tensor]
"""Changes the values of one feature, float ``(rows, ..., width)``."""


def unread_features(module: nn.Module, signature: Signature) -> dict[str, tuple[int, ...]]:
    """Find the columns of each table or dense input that do not affect the scores.

    A column is unread if all layers that it reaches have only zero weights for it, and if changing
    its values changes no score of synthetic rows. The second test is needed because a column can
    reach the scores without passing through a layer.

    Args:
        module: the network in evaluation mode; it is not changed.
        signature: describes its inputs.

    Returns:
        By table or dense input, the numbers of its unread columns. Names without unread columns are
        left out.
    """
    if not any(
        isinstance(part, nn.Linear) and not bool(part.weight.any(dim=0).all())
        for part in module.modules()
    ):
        return {}  # every layer has a nonzero weight for each of its inputs
    result = {}
    table_sizes = table_rows(module)
    for name, width, change_feature in _iterate_changeable_features(module, signature):
        is_read = _read_columns(module, signature, table_sizes, width, change_feature)
        unread = [
            column
            for column in range(width)
            if not is_read[column]
            and _keeps_scores(module, signature, table_sizes, change_feature, column)
        ]
        if unread:
            result[name] = tuple(unread)
    return result


ChangeFeature = Callable[[Inputs, Change, ExitStack], Inputs]
"""Applies a change to one feature of some inputs and returns the inputs. If the feature is the
output of a table, a forward hook applies the change while the network runs; the exit stack removes
the hook."""


def _iterate_changeable_features(
    module: nn.Module, signature: Signature
) -> Iterator[tuple[str, int, ChangeFeature]]:
    """Yield the name of each table and dense input, its width and the function that changes it."""
    for part in dense_columns(signature):

        def change_dense(
            inputs: Inputs, change: Change, _: ExitStack, part: DenseColumns = part
        ) -> Inputs:
            return change_columns(inputs, part, change)

        yield part.name, part.columns.stop - part.columns.start, change_dense
    for unit in Unit.of(module):
        if unit.role != "table" or unit.part_of is not None:  # no parts of composed tables
            continue
        table = module.get_submodule(unit.name)
        width = getattr(table, "embedding_dim", None)
        if not isinstance(width, int):  # compressed, or built from smaller tables
            continue

        def change_table(
            inputs: Inputs, change: Change, hooks: ExitStack, table: nn.Module = table
        ) -> Inputs:
            def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
                return change(output)

            hooks.callback(table.register_forward_hook(hook).remove)
            return inputs

        yield unit.name, width, change_table


@torch.no_grad()
def _read_columns(
    module: nn.Module,
    signature: Signature,
    table_sizes: dict[str, int],
    width: int,
    change_feature: ChangeFeature,
) -> list[bool]:
    """Return for each column whether a dense layer applies a nonzero weight to it.

    In row ``i`` of the batch, column ``i`` is NaN; a hook on each dense layer checks which of its
    inputs are NaN. ``table_sizes`` has the number of rows of each table.
    """
    is_read = torch.zeros(width, dtype=torch.bool)

    def mark(x: Tensor) -> Tensor:
        if len(x) != width:
            # The table was not called with one lookup per row: assume that every column is read.
            is_read[:] = True
            return x
        column = torch.arange(width)
        marked = x.clone()
        marked[column, ..., column] = torch.nan
        return marked

    def check(
        part: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        x = args[0] if args else named["input"]
        if len(x) != width or isinstance(part, PackedLinear):
            is_read.logical_or_(x.isnan().any())
        elif isinstance(part, nn.Linear):
            reached = x.isnan().reshape(width, -1, x.shape[-1]).any(dim=1)  # (columns, inputs)
            is_read.logical_or_((reached & part.weight.any(dim=0)).any(dim=1))
        return output.nan_to_num(nan=0.0)  # only the first layer that a column reaches counts

    with ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, nn.Linear | PackedLinear):
                hooks.callback(part.register_forward_hook(check, with_kwargs=True).remove)
        inputs = change_feature(generate_inputs(signature, table_sizes, width), mark, hooks)
        call_network(module, inputs, signature)
    return [bool(column) for column in is_read]


@torch.no_grad()
def _keeps_scores(
    module: nn.Module,
    signature: Signature,
    table_sizes: dict[str, int],
    change_feature: ChangeFeature,
    column: int,
) -> bool:
    """Whether the scores are the same after the values of a column are changed."""

    def shift(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[..., column] = SHIFT - 2 * changed[..., column]
        return changed

    before = network_scores(module, generate_inputs(signature, table_sizes, CHECK_ROWS), signature)
    with ExitStack() as hooks:
        inputs = change_feature(generate_inputs(signature, table_sizes, CHECK_ROWS), shift, hooks)
        after = network_scores(module, inputs, signature)
    return torch.equal(before, after)
