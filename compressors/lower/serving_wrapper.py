"""Wrap a model in the module that is exported; it adds the policy for ids out of range.

A model is served as one graph, ``model``, or for ``retrieval`` as two: ``query`` and ``item``, one
per tower. A graph has named inputs and one output: ``score`` float32 ``(rows,)``, which is a
probability if the model outputs logits or probabilities; or a tower's ``vector``, float32
``(rows, dim)``.

A graph cannot raise an error for an id out of range: for -1, ONNX Runtime returns the last row, and
TensorRT does not check. So with the policy ``error`` the graph refuses the row: its score or vector
is NaN, which valid rows never have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import AnyInput, DenseInput, JaggedBag, Signature, tensor_names
from compressors.core.modules.formats import Bag, gather_padded, pad_positions
from compressors.core.units import plain_bag, private_copy, swap
from compressors.lower.merged_tables import MergedTable, table_groups, with_merged_tables

SCORE = "score"
"""Name of the output of the graph ``model``."""
VECTOR = "vector"
"""Name of the output of a tower's graph."""


@dataclass(frozen=True)
class ServedGraph:
    """One graph of a model.

    Attributes:
        name: ``model``, ``query`` or ``item``.
        signature: the model's signature with the inputs of this graph only.
        module: attribute path of the submodule that the graph runs; empty for the whole model.
        output: name of the output, ``score`` or ``vector``.
    """

    name: str
    signature: Signature
    module: str
    output: str

    def part(self, model: nn.Module) -> nn.Module:
        """Return the submodule of a model that this graph runs."""
        return model.get_submodule(self.module)


def served_graphs(signature: Signature) -> tuple[ServedGraph, ...]:
    """Return the graphs of a model.

    A request runs the first one. If there is a second one, ``item``, its vectors are computed in
    advance.
    """
    if signature.towers is None:
        return (ServedGraph("model", signature, "", SCORE),)
    return tuple(
        ServedGraph(name, signature.only(tower.inputs), tower.module, VECTOR)
        for name, tower in signature.towers.named().items()
    )


class ServingWrapper(nn.Module):
    """The exported module: applies the id policy, runs one graph's submodule, converts the output.

    Its inputs are tensors in the order of ``input_names(served_graph.signature)``.

    Attributes:
        model: the model, prepared by ``wrap_for_serving``.
        served_graph: the graph that this module computes.
        rows_of_table: number of rows by table name.
        together: the merged lookups, which run before the model.
    """

    def __init__(
        self,
        model: nn.Module,
        served_graph: ServedGraph,
        rows_of_table: dict[str, int],
        merged_tables: Sequence[MergedTable] = (),
    ) -> None:
        super().__init__()
        self.model = model
        # Names of initializers in stored graphs begin with this name, so it must not change.
        self.together = nn.ModuleList(merged_tables)
        self.served_graph = served_graph
        self.signature = served_graph.signature
        self.rows_of_table = rows_of_table

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(input_names(self.signature), tensors, strict=True))
        refused: Tensor | None = None
        merged_inputs: set[str] = set()
        for group in self.together:
            assert isinstance(group, MergedTable)  # noqa: S101 - a ModuleList has lost the type
            looked_up_rows, newly_refused = group([inputs[name] for name in group.names])
            inputs.update(zip(group.names, looked_up_rows, strict=True))
            merged_inputs |= set(group.names)
            if newly_refused is not None:
                refused = newly_refused if refused is None else refused | newly_refused
        for item in self.signature.inputs:
            if isinstance(item, DenseInput) or item.name in merged_inputs:
                continue
            ids = inputs[item.name]
            rows = self.rows_of_table[item.table]
            inside = ids.clamp(0, rows - 1)
            outside = inside != ids  # one operator less than comparing with both bounds
            if item.out_of_range == "default_row":
                inside = torch.where(outside, item.default_row, ids)
            inputs[item.name] = inside
            newly_refused = _refused_rows(item, outside, inputs)
            if newly_refused is not None:
                refused = newly_refused if refused is None else refused | newly_refused
        output: Tensor = self.served_graph.part(self.model)(**inputs)
        if self.served_graph.output == VECTOR:
            if refused is not None:
                output = torch.where(refused.unsqueeze(1), torch.nan, output)
            return output.to(torch.float32)
        score = output.squeeze(1) if output.dim() == 2 else output  # from (rows, 1)
        if self.signature.single_output.form == "logit":
            score = torch.sigmoid(score)
        if refused is not None:
            score = torch.where(refused, torch.nan, score)
        return score.to(torch.float32)


def _refused_rows(item: AnyInput, outside: Tensor, inputs: dict[str, Tensor]) -> Tensor | None:
    """Return which rows to refuse, bool ``(rows,)``; None if this input refuses none.

    A row is refused if an id is out of range and the policy is ``error``, or if its list of ids is
    too long. ``outside`` marks ids out of range; ``inputs`` are the graph's tensors by name.
    """
    if isinstance(item, JaggedBag):
        bounds = inputs[tensor_names(item)[1]]
        first_id = bounds if item.layout == "offsets" else bounds.cumsum(0) - bounds
        count = outside.shape[0]
        end_id = torch.cat([first_id[1:], first_id.new_full((1,), count)])
        is_refused = (end_id - first_id) > item.shape[0]
        if item.out_of_range == "error":
            inside, position = pad_positions(first_id, end_id, count, item.shape[0])
            # As floats: not every target can gather or reduce booleans.
            outside_in_list = gather_padded(outside.to(torch.float32), position) * inside
            is_refused = is_refused | (outside_in_list.sum(dim=1) > 0)
        return is_refused
    if isinstance(item, DenseInput) or item.out_of_range != "error":
        return None
    return outside if outside.dim() == 1 else outside.to(torch.float32).sum(dim=1) > 0


def input_names(signature: Signature) -> tuple[str, ...]:
    """Return the names of the graph's inputs, in order."""
    return tuple(name for item in signature.inputs for name in tensor_names(item))


def wrap_for_serving(
    model: nn.Module,
    served_graph: ServedGraph,
    rows_of_table: dict[str, int],
    *,
    merge_lookups: bool = False,
) -> ServingWrapper:
    """Prepare a model for export, or for comparison with its graph.

    Args:
        model: the model; it is not modified. The result shares its tensors, except those of tables
            whose lookups are merged.
        served_graph: the graph to prepare.
        rows_of_table: number of rows by table name.
        merge_lookups: whether to merge lookups in tables of the same format.

    Returns:
        The wrapper in evaluation mode. Each EmbeddingBag is replaced by a ``Bag`` of basic
        operators.
    """
    copy = private_copy(model).eval()
    longest_list: dict[str, int] = {}
    for item in served_graph.signature.inputs:
        if isinstance(item, JaggedBag):
            longest_list[item.table] = max(longest_list.get(item.table, 0), item.shape[0])
    for name, module in list(copy.named_modules()):
        if isinstance(module, nn.EmbeddingBag):
            swap(copy, name, plain_bag(module, longest_list.get(name)))
        elif isinstance(module, Bag):
            module.longest = longest_list.get(name)
    if not merge_lookups:
        return ServingWrapper(copy, served_graph, rows_of_table).eval()
    groups = table_groups(copy, served_graph.part(copy), served_graph.signature, rows_of_table)
    lookups = [MergedTable(group, rows_of_table) for group in groups]
    return ServingWrapper(
        with_merged_tables(copy, groups), served_graph, rows_of_table, lookups
    ).eval()


def dynamic_shapes(signature: Signature, most_rows: int) -> tuple[dict[int, Any], ...]:
    """Return the dynamic dimensions of the graph's inputs, for ``torch.export``.

    Args:
        signature: the graph's inputs.
        most_rows: the largest batch size.
    """
    batch = torch.export.Dim("batch", min=1, max=most_rows)
    shapes: list[dict[int, Any]] = []
    for item in signature.inputs:
        if isinstance(item, JaggedBag):
            most_ids = most_rows * item.shape[0]
            shapes.append({0: torch.export.Dim(f"ids_{len(shapes)}", min=0, max=most_ids)})
        shapes.append({0: batch})
    return tuple(shapes)
