"""The module that is exported and served: a model with its id policy and output, on every target.

A model is served as one graph, ``model``, or for ``retrieval`` as two: ``query`` and ``item``, one
per tower. A graph has named inputs and one output: ``score`` float32 ``(rows,)``, a probability
for ``ctr``; or a tower's ``vector``, float32 ``(rows, dim)``. The policy for ids out of range is
part of the graph. A graph cannot raise for the policy ``error`` (for -1, ONNX Runtime returns the
last row; TensorRT does not check), so the score or vector of such a row is NaN, which cannot be
confused with a valid result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import AnyInput, DenseInput, JaggedBag, Signature, tensor_names
from compressors.core.modules.formats import Bag, pad_positions, padded
from compressors.core.units import plain_bag, private_copy, swap
from compressors.lower.merged_tables import MergedTable, table_groups, with_merged_tables

SCORE = "score"
VECTOR = "vector"


@dataclass(frozen=True)
class ServedGraph:
    """One graph of a model: its name, inputs, submodule and output.

    ``signature`` has the inputs of this graph only. ``module`` is the attribute path of the
    submodule that the graph runs; empty for the whole model.
    """

    name: str
    signature: Signature
    module: str
    output: str

    def part(self, model: nn.Module) -> nn.Module:
        """The submodule of a model that this graph runs."""
        return model.get_submodule(self.module)


def served_graphs(signature: Signature) -> tuple[ServedGraph, ...]:
    """The graphs of a model with this signature; a request waits for the first one."""
    if signature.towers is None:
        return (ServedGraph("model", signature, "", SCORE),)
    return tuple(
        ServedGraph(name, signature.only(tower.inputs), tower.module, VECTOR)
        for name, tower in signature.towers.named().items()
    )


class ServingWrapper(nn.Module):
    """A graph's part of a model with its input policy and output form.

    Takes tensors in the order of the form's signature.
    """

    def __init__(
        self,
        model: nn.Module,
        form: ServedGraph,
        rows_of_table: dict[str, int],
        together: Sequence[MergedTable] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.together = nn.ModuleList(together)
        self.form = form
        self.signature = form.signature
        self.rows_of_table = rows_of_table

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(input_names(self.signature), tensors, strict=True))
        refused: Tensor | None = None
        looked_up: set[str] = set()
        for group in self.together:
            assert isinstance(group, MergedTable)  # noqa: S101 - a ModuleList has lost the type
            rows_of, newly_refused = group([inputs[name] for name in group.names])
            inputs.update(zip(group.names, rows_of, strict=True))
            looked_up |= set(group.names)
            if newly_refused is not None:
                refused = newly_refused if refused is None else refused | newly_refused
        for item in self.signature.inputs:
            if isinstance(item, DenseInput) or item.name in looked_up:
                continue
            ids = inputs[item.name]
            rows = self.rows_of_table[item.table]
            inside = ids.clamp(0, rows - 1)
            outside = inside != ids  # two operators; comparing with both bounds takes three
            if item.out_of_range == "default_row":
                inside = torch.where(outside, item.default_row, ids)
            inputs[item.name] = inside
            newly_refused = _refused_rows(item, outside, inputs)
            if newly_refused is not None:
                refused = newly_refused if refused is None else refused | newly_refused
        score: Tensor = self.form.part(self.model)(**inputs)
        if self.form.output == VECTOR:
            if refused is not None:
                score = torch.where(refused.unsqueeze(1), torch.nan, score)
            return score.to(torch.float32)
        if score.dim() == 2:  # (rows, 1)
            score = score.squeeze(1)
        if self.signature.single_output.form == "logit":
            score = torch.sigmoid(score)
        if refused is not None:
            score = torch.where(refused, torch.nan, score)
        return score.to(torch.float32)


def _refused_rows(item: AnyInput, outside: Tensor, given: dict[str, Tensor]) -> Tensor | None:
    """Rows to refuse: an id is out of range and the policy is ``error``, or a list is too long."""
    if isinstance(item, JaggedBag):
        second = given[tensor_names(item)[1]]
        begin = second if item.layout == "offsets" else second.cumsum(0) - second
        count = outside.shape[0]
        end = torch.cat([begin[1:], begin.new_full((1,), count)])
        bad = (end - begin) > item.shape[0]
        if item.out_of_range == "error":
            inside, position = pad_positions(begin, end, count, item.shape[0])
            # As floats: not every target can gather or reduce booleans.
            hits = padded(outside.to(torch.float32), position) * inside
            bad = bad | (hits.sum(dim=1) > 0)
        return bad
    if isinstance(item, DenseInput) or item.out_of_range != "error":
        return None
    return outside if outside.dim() == 1 else outside.to(torch.float32).sum(dim=1) > 0


def input_names(signature: Signature) -> tuple[str, ...]:
    """Names of the graph's inputs, in order."""
    return tuple(name for item in signature.inputs for name in tensor_names(item))


def wrap_for_serving(
    model: nn.Module, form: ServedGraph, rows_of_table: dict[str, int], *, together: bool = False
) -> ServingWrapper:
    """Prepare a model for export or comparison: rewrite bags, add id policy and output form.

    The given module is not modified. Its tensors are shared, except for those of tables whose
    lookups are merged (``together``).
    """
    copy = private_copy(model).eval()
    longest: dict[str, int] = {}
    for item in form.signature.inputs:
        if isinstance(item, JaggedBag):
            longest[item.table] = max(longest.get(item.table, 0), item.shape[0])
    for name, module in list(copy.named_modules()):
        if isinstance(module, nn.EmbeddingBag):
            swap(copy, name, plain_bag(module, longest.get(name)))
        elif isinstance(module, Bag):
            module.longest = longest.get(name)
    if not together:
        return ServingWrapper(copy, form, rows_of_table).eval()
    groups = table_groups(copy, form.part(copy), form.signature, rows_of_table)
    lookups = [MergedTable(group, rows_of_table) for group in groups]
    return ServingWrapper(with_merged_tables(copy, groups), form, rows_of_table, lookups).eval()


def dynamic_shapes(signature: Signature, most_rows: int) -> tuple[dict[int, Any], ...]:
    """The dynamic dimensions of the graph's inputs, for ``torch.export``."""
    batch = torch.export.Dim("batch", min=1, max=most_rows)
    shapes: list[dict[int, Any]] = []
    for item in signature.inputs:
        if isinstance(item, JaggedBag):
            most = most_rows * item.shape[0]
            shapes.append({0: torch.export.Dim(f"ids_{len(shapes)}", min=0, max=most)})
        shapes.append({0: batch})
    return tuple(shapes)
