"""Graphs of every step have the scores of torch, also for ids out of range.

The targets are ONNX Runtime and TensorRT-RTX, whose graphs run in ONNX Runtime, too.
``run_in_torch`` runs the serving wrapper, the module that is exported: the network, the policy for
ids out of range, and the sigmoid.
"""

import itertools

import numpy as np
import pytest
import torch
from models import (
    LONGEST,
    RANKER,
    RECIPES,
    REFERENCES,
    UNDIVIDED,
    Graph,
    lower_reference,
)
from pairwise import pairwise
from torch import Tensor

from compressors.contracts import DenseInput, JaggedBag, TargetName
from compressors.core.random_inputs import generate_edge_inputs
from compressors.lower.comparison.parity import check_parity

ORT: TargetName = "onnxruntime"
RTX: TargetName = "tensorrt-rtx"
# ``LONGEST`` is the declared length of the longest list in a jagged bag.
# ``UNDIVIDED`` are the methods that change graphs and keep each table as one table. Each is in one
# recipe of ``RECIPES``, most with another method, so that fewer graphs are exported.
KINDS = [method.model_fields["kind"].default for method in UNDIVIDED]
INT8_RECIPE = ("rowwise_int8", "static_int8")

each_target = pytest.mark.parametrize("target", [ORT, RTX])
# In the nightly tier every method is also the only step of a recipe.
SINGLE_STEPS = [(kind,) for kind in KINDS if (kind,) not in RECIPES]


def networks_and_recipes(*networks: str) -> pytest.MarkDecorator:
    """Parametrize a test with every recipe on each of these networks.

    The default tier (cases without the marker ``nightly``) has the ranker without a step and with
    ``INT8_RECIPE``, and the compact network with every recipe.
    """
    on_ranker = [(), INT8_RECIPE]
    on_compact = [(), *RECIPES]
    cases = [
        pytest.param(
            name,
            kinds,
            id=f"{name}-{'+'.join(kinds) or '-'}",
            marks=()
            if kinds in (on_ranker if name == "Ranker" else on_compact)
            else pytest.mark.nightly,
        )
        for name in networks
        for kinds in ((), *RECIPES, INT8_RECIPE, *SINGLE_STEPS)
    ]
    return pytest.mark.parametrize(("network", "kinds"), cases)


def test_default_tier_has_a_graph_for_every_method():
    assert sorted(kind for recipe in RECIPES for kind in recipe) == sorted(KINDS)
    default = [case.values for case in networks_and_recipes("Compact").args[1] if not case.marks]
    assert {kinds for _, kinds in default} >= set(RECIPES)


def assert_equal_scores(
    graph: Graph, target: TargetName, inputs: dict[str, Tensor], spread: float
) -> None:
    """Assert that scores are equal within a tolerance, a multiple of ``spread``.

    ``spread`` is the standard deviation of the scores of a large batch.
    """
    expected, actual = graph.run_in_torch(inputs), graph.run_in_onnx(inputs)
    assert actual.dtype == np.float32
    assert np.array_equal(np.isnan(expected), np.isnan(actual))
    formats = {line.format for line in graph.model.plan.lines} if graph.model.plan else set()
    factor = 1e-3
    if target != ORT and formats - {"float32", "as trained", "dropped"}:
        factor = 0.05  # one float16 rounding of weights
    if formats & {"weight_int8", "weight_int4", "float8_dense"}:
        factor = 0.05 if target == ORT else 0.3  # int8 or float8 rounding of inputs
    if "static_int8" in formats:
        factor = 0.5  # an input may be rounded to either of two levels
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 + factor * spread)


# --- equal scores of graph and torch ---------------------------------------------------------


@each_target
@networks_and_recipes("Ranker", "Compact")
def test_graph_has_the_scores_of_torch_at_every_batch_size(network, kinds, target):
    graph = lower_reference(network, kinds, target)
    inputs = graph.rows(1500)
    spread = float(np.std(graph.run_in_torch(inputs)))
    check_parity(graph.run_in_torch(inputs), graph.run_in_onnx(inputs), graph.model.plan, target)
    for count in (1, 2, 57):
        assert_equal_scores(graph, target, graph.rows(count, seed=count), spread)
    outside = generate_edge_inputs(graph.signature, graph.lowered.wrapper.rows_of_table, 57)
    assert_equal_scores(graph, target, outside, spread)


@each_target
@networks_and_recipes("Ranker")
def test_batch_with_only_empty_bags_has_the_scores_of_the_module(network, kinds, target):
    graph = lower_reference(network, kinds, target)
    for count in (1, 3):
        inputs = graph.rows(count)
        for name in ("history", "tags"):
            inputs[name] = inputs[name][:0]
        inputs["history_offsets"] = torch.zeros(count, dtype=torch.int64)
        inputs["tags_lengths"] = torch.zeros(count, dtype=torch.int64)
        inputs["genres"] = torch.zeros(count, 4, dtype=torch.int64)
        # These few rows have almost equal scores, so the spread is that of other batches.
        assert_equal_scores(graph, target, inputs, spread=0.02)
        assert not np.isnan(graph.run_in_onnx(inputs)).any()


OTHERS = [reference.network.__name__ for reference in REFERENCES[1:]]
OTHER_RECIPES = (INT8_RECIPE, ("rowwise_int4", "float16"))
OTHER_GRAPHS = pairwise(OTHERS, OTHER_RECIPES, (ORT, RTX))


@pytest.mark.parametrize(
    ("reference", "kinds", "target"),
    [
        pytest.param(
            *combination,
            id=f"{combination[0]}-{'+'.join(combination[1])}-{combination[2]}",
            marks=() if combination in OTHER_GRAPHS else pytest.mark.nightly,
        )
        for combination in itertools.product(OTHERS, OTHER_RECIPES, (ORT, RTX))
    ],
)
def test_graphs_of_other_networks_have_the_scores_of_torch(reference, kinds, target):
    graph = lower_reference(reference, kinds, target)
    inputs = graph.rows(1500)
    check_parity(graph.run_in_torch(inputs), graph.run_in_onnx(inputs), graph.model.plan, target)
    spread = float(np.std(graph.run_in_torch(inputs)))
    for count in (1, 2, 57):
        assert_equal_scores(graph, target, graph.rows(count, seed=count), spread)


@each_target
def test_weight_only_layer_at_each_position_of_a_list_has_the_scores_of_torch(target):
    graph = lower_reference("Attention", ("weight_int4",), target)
    inputs = graph.rows(1500)
    check_parity(graph.run_in_torch(inputs), graph.run_in_onnx(inputs), graph.model.plan, target)


@each_target
def test_serving_wrapper_has_the_scores_of_the_module(target):
    graph = lower_reference("Ranker", INT8_RECIPE, target)
    inputs = graph.rows(20)
    with torch.no_grad():
        logits = graph.model.module(**inputs).squeeze(1)
    # The wrapper pads bags, jagged ones to their declared length, so sums have another order.
    np.testing.assert_allclose(graph.run_in_torch(inputs), logits.sigmoid().numpy(), atol=1e-3)


# --- the policy for ids out of range ---------------------------------------------------------
#
# Rows of the ranker's tables: ``user`` 40, ``item`` 300, ``city`` 9, ``genres`` 20, ``history`` 50,
# ``tags`` 30. The default row is 3 for ``city`` and 2 for ``tags``.


def find_refused_rows(graph: Graph, inputs: dict[str, Tensor]) -> list[int]:
    """Return the rows with NaN scores, which must be the same in the graph and in torch."""
    expected, actual = graph.run_in_torch(inputs), graph.run_in_onnx(inputs)
    assert np.array_equal(np.isnan(expected), np.isnan(actual))
    return np.flatnonzero(np.isnan(actual)).tolist()


@each_target
@pytest.mark.parametrize("bad_id", [-1, 40, 2**40])
def test_policy_error_refuses_only_the_row_with_an_id_out_of_range(target, bad_id):
    graph = lower_reference("Ranker", INT8_RECIPE, target)
    inputs = graph.rows(9)
    before = graph.run_in_onnx(inputs)
    inputs["user"][[2, 7]] = bad_id
    assert find_refused_rows(graph, inputs) == [2, 7]
    valid_rows = [0, 1, 3, 4, 5, 6, 8]
    np.testing.assert_array_equal(graph.run_in_onnx(inputs)[valid_rows], before[valid_rows])


@each_target
@pytest.mark.parametrize("bad_id", [-1, 20])
def test_policy_error_refuses_only_the_row_with_a_padded_id_out_of_range(target, bad_id):
    graph = lower_reference("Ranker", INT8_RECIPE, target)
    inputs = graph.rows(6)
    inputs["genres"][4, 3] = bad_id
    assert find_refused_rows(graph, inputs) == [4]


@each_target
@pytest.mark.parametrize("bad_id", [-1, 50])
@pytest.mark.parametrize(("position", "row"), [(0, 1), (1, 1), (2, 3), (4, 3), (5, 4)])
def test_policy_error_refuses_only_the_row_with_a_jagged_id_out_of_range(
    target, bad_id, position, row
):
    graph = lower_reference("Ranker", INT8_RECIPE, target)
    inputs = graph.rows(6)
    inputs["history"] = torch.arange(6) + 1
    inputs["history_offsets"] = torch.tensor([0, 0, 2, 2, 5, 6])  # lists of 0, 2, 0, 3, 1, 0 ids
    inputs["history"][position] = bad_id
    assert find_refused_rows(graph, inputs) == [row]


@each_target
def test_policy_clamp_replaces_an_id_out_of_range_by_the_nearest(target):
    graph = lower_reference("Ranker", INT8_RECIPE, target)
    inputs = graph.rows(4)
    inputs["item"] = torch.tensor([-5, 300, 10**9, 7])
    actual = graph.run_in_onnx(inputs)
    inputs["item"] = torch.tensor([0, 299, 299, 7])
    np.testing.assert_array_equal(actual, graph.run_in_onnx(inputs))
    assert not np.isnan(actual).any()


@each_target
def test_policy_default_row_replaces_an_id_out_of_range_by_the_default(target):
    graph = lower_reference("Ranker", INT8_RECIPE, target)
    inputs = graph.rows(3)
    inputs["tags_lengths"] = torch.tensor([2, 0, 3])
    inputs["tags"] = torch.tensor([-1, 5, 30, 4, 10**6], dtype=torch.int32)
    inputs["city"] = torch.tensor([-1, 9, 0], dtype=torch.int32)
    actual = graph.run_in_onnx(inputs)
    inputs["tags"] = torch.tensor([2, 5, 2, 4, 2], dtype=torch.int32)
    inputs["city"] = torch.tensor([3, 3, 0], dtype=torch.int32)
    np.testing.assert_array_equal(actual, graph.run_in_onnx(inputs))
    assert not np.isnan(actual).any()


@each_target
@pytest.mark.parametrize("name", ["history", "tags"])
def test_row_with_a_list_longer_than_declared_is_refused(target, name):
    graph = lower_reference("Ranker", INT8_RECIPE, target)
    inputs = graph.rows(3)
    lengths = torch.tensor([LONGEST, LONGEST + 1, 1])
    inputs[name] = torch.ones(int(lengths.sum()), dtype=inputs[name].dtype)
    lengths_or_offsets = lengths if name == "tags" else lengths.cumsum(0) - lengths
    inputs[f"{name}_{'lengths' if name == 'tags' else 'offsets'}"] = lengths_or_offsets
    assert find_refused_rows(graph, inputs) == [1]


def test_reference_signature_has_every_policy_layout_and_input_kind():
    """The tests above cover a policy, layout or input kind only if the signature has it."""
    id_inputs = [item for item in RANKER.signature.inputs if not isinstance(item, DenseInput)]
    assert {item.out_of_range for item in id_inputs} == {"error", "clamp", "default_row"}
    layouts = {item.layout for item in id_inputs if isinstance(item, JaggedBag)}
    assert layouts == {"offsets", "lengths"}
    assert {item.kind for item in RANKER.signature.inputs} == {
        "id",
        "dense",
        "padded_bag",
        "jagged_bag",
    }
