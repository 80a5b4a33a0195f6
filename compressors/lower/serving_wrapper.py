"""Wrap a model in the module that is exported; it adds the policy for ids out of range.

A model is served as one graph, ``model``, or for ``retrieval`` as two: ``query`` and ``item``, one
per tower. If both towers are one module, there is one graph, ``encoder``. A graph has named inputs
and outputs. The graph of a tower has the output ``vector``, float32 ``(rows, dim)``. The graph
``model`` has an output for each output of the model, float32 ``(rows,)``: a probability if the
model outputs logits or probabilities, else a score. It is called ``score`` if there is one, and has
the name that the signature gives it if there are several.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import (
    IdInput,
    JaggedBag,
    Output,
    SequenceInput,
    Signature,
    all_tables,
    tensor_names,
)
from compressors.core.modules.formats import Bag
from compressors.core.scores import call_network, join_columns, output_tensors, row_vectors
from compressors.core.units import plain_bag, private_copy, swap
from compressors.lower.recurrent_layers import replace_recurrent_layers
from compressors.lower.value_policy import apply_policy, apply_policy_to_joined

SCORE = "score"
"""Name of the only output of the graph ``model``."""
VECTOR = "vector"
"""Name of the output of a tower's graph."""
ENCODER = "encoder"
"""Name of the graph of both towers, if they are one module."""


@dataclass(frozen=True)
class ServedGraph:
    """One graph of a model.

    Attributes:
        name: ``model``, ``query``, ``item`` or ``encoder``.
        signature: the model's signature with the inputs of this graph only. Those of ``encoder``
            have the names of the query tower's inputs.
        module: attribute path of the submodule that the graph runs; empty for the whole model, and
            for a tower that is a method of the model.
        outputs: names of the graph's outputs: ``score`` if there is only one; else the names in the
            signature; ``vector`` for a tower.
        towers: names of the towers that the graph computes; none for the graph ``model``.
    """

    name: str
    signature: Signature
    module: str
    outputs: tuple[str, ...]
    towers: tuple[str, ...] = ()

    @property
    def is_tower(self) -> bool:
        """Whether the graph computes the vectors of a tower."""
        return bool(self.towers)

    def part(self, model: nn.Module) -> nn.Module:
        """Return the submodule of a model of which this graph runs a method."""
        return model.get_submodule(self.module)


def served_graphs(signature: Signature) -> tuple[ServedGraph, ...]:
    """Return the graphs of a model.

    A request runs the first one. The vectors of items are computed in advance, by the second graph
    or by the same one.
    """
    if signature.towers is None:
        names = tuple(output.name for output in signature.outputs)
        outputs = names if signature.has_several_outputs else (SCORE,)
        return (ServedGraph("model", signature, module="", outputs=outputs),)
    towers = signature.towers.named()
    if signature.shares_tower:
        of_both = _allow_longest_lists(*(signature.of_tower(name) for name in towers))
        module = signature.towers.query.module
        return (ServedGraph(ENCODER, of_both, module, (VECTOR,), tuple(towers)),)
    return tuple(
        ServedGraph(name, signature.of_tower(name), tower.module, (VECTOR,), (name,))
        for name, tower in towers.items()
    )


def _allow_longest_lists(query: Signature, item: Signature) -> Signature:
    """Return the query tower's signature; its sequences may be as long as in either tower."""
    inputs = tuple(
        first.model_copy(update={"shape": max(first.shape, second.shape)})
        if isinstance(first, SequenceInput)
        else first
        for first, second in zip(query.inputs, item.inputs, strict=True)
    )
    return query.model_copy(update={"inputs": inputs})


class ServingWrapper(nn.Module):
    """The exported module: replaces invalid ids, runs one graph's submodule, converts the outputs.

    Its inputs are tensors in the order of ``input_names(served_graph.signature)``.

    Attributes:
        model: the model, prepared by ``wrap_for_serving``.
        served_graph: the graph that this module computes.
        rows_of_table: number of rows by table name.
        joins_ids: whether the ids of several inputs become one matrix. The policy is then applied
            to all of them at once, and their lookups can be merged.
    """

    def __init__(
        self,
        model: nn.Module,
        served_graph: ServedGraph,
        rows_of_table: dict[str, int],
        *,
        joins_ids: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # Tables that lowering concatenates; their stored tensors have names of this attribute.
        self.together = nn.ModuleList()
        self.joins_ids = joins_ids
        self.served_graph = served_graph
        self.signature = served_graph.signature
        self.rows_of_table = rows_of_table

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the output, or a tuple of several, in the order of ``served_graph.outputs``."""
        inputs = dict(zip(input_names(self.signature), tensors, strict=True))
        refused: Tensor | None = None
        groups = self._group_ids() if self.joins_ids else []
        joined = {item.name for group in groups for item in group}
        for group in groups:
            newly_refused = apply_policy_to_joined(group, inputs, self.rows_of_table)
            refused = _join_refused(refused, newly_refused)
        for item in self.signature.model_inputs:
            if item.name not in joined:
                newly_refused = apply_policy(item, inputs, self.rows_of_table)
                refused = _join_refused(refused, newly_refused)
        output = call_network(self.served_graph.part(self.model), inputs, self.signature)
        if self.served_graph.is_tower:
            output = row_vectors(output)
            if refused is not None:
                output = torch.where(refused.unsqueeze(1), torch.nan, output)
            vector: Tensor = output.to(torch.float32)
            return vector
        scores: tuple[Tensor, ...]
        if isinstance(output, Tensor) and not self.signature.has_several_outputs:
            scores = (output.squeeze(1) if output.dim() == 2 else output,)  # from (rows, 1)
        else:
            scores = output_tensors(output, self.signature)
        served = tuple(
            _refuse_rows(declared, score, refused)
            for declared, score in zip(self.signature.outputs, scores, strict=True)
        )
        return served if self.signature.has_several_outputs else served[0]

    def _group_ids(self) -> list[list[IdInput]]:
        """Return the inputs with one id per row, by type and policy; groups of at least two."""
        groups: dict[tuple[str, str], list[IdInput]] = {}
        for item in self.signature.model_inputs:
            if isinstance(item, IdInput) and not item.shape:
                groups.setdefault((item.dtype, item.out_of_range), []).append(item)
        return [group for group in groups.values() if len(group) > 1]


def _join_refused(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the rows that at least one of two inputs refuses; None refuses no row."""
    if first is None or second is None:
        return second if first is None else first
    return first | second


def _refuse_rows(declared: Output, score: Tensor, refused: Tensor | None) -> Tensor:
    """Return an output ``(rows,)`` as it is served; rows in ``refused`` are NaN."""
    if declared.form == "logit":
        score = torch.sigmoid(score)
    if refused is not None:
        score = torch.where(refused, torch.nan, score)
    return score.to(torch.float32)


def stack_outputs(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return what a ``ServingWrapper`` returned as one tensor; several outputs are its columns."""
    return returned if isinstance(returned, Tensor) else join_columns(returned)


def input_names(signature: Signature) -> tuple[str, ...]:
    """Return the names of the graph's inputs, in order."""
    return tuple(name for item in signature.model_inputs for name in tensor_names(item))


def wrap_for_serving(
    model: nn.Module,
    served_graph: ServedGraph,
    rows_of_table: dict[str, int],
    *,
    joins_ids: bool = False,
) -> ServingWrapper:
    """Prepare a model for export, or for comparison with its graph.

    Args:
        model: the model; it is not modified. The result shares its tensors.
        served_graph: the graph to prepare.
        rows_of_table: number of rows by table name.
        joins_ids: see ``ServingWrapper``.

    Returns:
        The wrapper in evaluation mode. Each EmbeddingBag is replaced by a ``Bag`` of basic
        operators, and recurrent layers call the custom ops of ``recurrent_layers.py``.
    """
    copy = private_copy(model).eval()
    longest_list: dict[str, int] = {}
    for item in served_graph.signature.inputs:
        if not isinstance(item, JaggedBag):
            continue
        for table in all_tables(item):
            longest_list[table] = max(longest_list.get(table, 0), item.shape[0])
    for name, module in list(copy.named_modules()):
        if isinstance(module, nn.EmbeddingBag):
            swap(copy, name, plain_bag(module, longest_list.get(name)))
        elif isinstance(module, Bag):
            module.longest = longest_list.get(name)
    replace_recurrent_layers(copy)
    return ServingWrapper(copy, served_graph, rows_of_table, joins_ids=joins_ids).eval()


def dynamic_shapes(signature: Signature, most_rows: int) -> tuple[dict[int, Any], ...]:
    """Return the dynamic dimensions of the graph's inputs, for ``torch.export``.

    Args:
        signature: the graph's inputs.
        most_rows: the largest batch size.
    """
    batch = torch.export.Dim("batch", min=1, max=most_rows)
    shapes: list[dict[int, Any]] = []
    lengths: dict[str, Any] = {}
    for item in signature.model_inputs:
        if isinstance(item, SequenceInput):
            name = item.same_length_as or item.name
            if item.is_dynamic and name not in lengths:
                lengths[name] = torch.export.Dim(
                    f"length_{len(lengths)}", min=item.shortest, max=item.shape[0]
                )
            per_id = {0: batch, 1: lengths[name]} if item.is_dynamic else {0: batch}
            shapes += [per_id if t in item.tensors_of_ids else {0: batch} for t in item.tensors]
            continue
        if isinstance(item, JaggedBag):
            most_ids = most_rows * item.shape[0]
            shapes.append({0: torch.export.Dim(f"ids_{len(shapes)}", min=0, max=most_ids)})
        shapes.append({0: batch})
    return tuple(shapes)
