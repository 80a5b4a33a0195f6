"""Graphs of a network with three outputs: names, scores, refused rows and parity per output.

``MULTI_TASK`` of ``models.py`` has logits ``click`` and ``like`` and a probability ``buy``. Parity
is the comparison of a graph's scores with those of the module; its limits are relative to the
standard deviation of the module's scores. A refused row has NaN scores. The wrapper is the torch
module that is exported: the network, with its logits converted to probabilities.
"""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from error_codes import raises_code
from models import MULTI_TASK, default_step

from compressors.core.random_inputs import generate_inputs
from compressors.core.registries import METHODS
from compressors.core.runner import run
from compressors.core.scores import network_scores
from compressors.errors.compression import ParityLost
from compressors.lower.comparison.parity import check_outputs, worst_parity
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs, stack_outputs
from infra.onnxruntime.sessions import Session

NAMES = ("click", "like", "buy")
RECIPES = ((), ("rowwise_int8", "fold", "static_int8"), ("rowwise_int4", "float16"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Return the compressed network for each recipe (a tuple of method names)."""
    folder = tmp_path_factory.mktemp("recipes")
    bench, models = MULTI_TASK.bench(folder / "data"), {(): MULTI_TASK.model()}
    for recipe in RECIPES[1:]:
        model = MULTI_TASK.model()
        for kind in recipe:
            step = default_step(METHODS[kind])
            model = run(step, model, bench, folder / "-".join((*recipe, kind)))
        models[recipe] = model
    return models


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("recipe", RECIPES, ids="+".join)
def test_graph_has_the_outputs_of_the_signature_with_the_scores_of_the_module(
    recipe, target, compressed, tmp_path
):
    (served_graph,) = served_graphs(MULTI_TASK.signature)  # one, since there are no towers
    assert served_graph.outputs == NAMES
    model, path = compressed[recipe], tmp_path / "model.onnx"
    lowered = lower(model.module, served_graph, target, path)
    graph = onnx.load(path).graph
    assert tuple(item.name for item in graph.output) == NAMES
    for rows in (1, 64):
        inputs = generate_inputs(MULTI_TASK.signature, MULTI_TASK.rows_of_tables(), rows, seed=5)
        graph_scores = Session(path, threads=1).scores({k: v.numpy() for k, v in inputs.items()})
        assert graph_scores.shape == (rows, 3)
        with torch.no_grad():
            expected = network_scores(model.module, inputs, MULTI_TASK.signature)
            wrapper_scores = stack_outputs(lowered.wrapper(*inputs.values())).numpy()
        # The logits ``click`` and ``like`` are served as probabilities; ``buy`` is one already.
        expected[:, :2] = expected[:, :2].sigmoid()
        # The tolerance is for float32 rounding.
        np.testing.assert_allclose(wrapper_scores, expected.numpy(), atol=1e-6)
        if rows > 1:  # the standard deviation of one score is 0, and limits are relative to it
            check_outputs(wrapper_scores, graph_scores, NAMES, model.plan, target)


def test_a_refused_row_is_nan_in_every_output(tmp_path):
    (served_graph,) = served_graphs(MULTI_TASK.signature)
    path = tmp_path / "model.onnx"
    lower(MULTI_TASK.model().module, served_graph, "onnxruntime", path)
    inputs = generate_inputs(MULTI_TASK.signature, MULTI_TASK.rows_of_tables(), 4, seed=5)
    inputs["user"][2] = 40  # not in the table, which has rows 0 to 39: the row is refused
    inputs["item"][1] = 99  # not in the table either, but this input clamps ids to its rows
    scores = Session(path, threads=1).scores({k: v.numpy() for k, v in inputs.items()})
    assert np.isnan(scores).tolist() == [[False] * 3, [False] * 3, [True] * 3, [False] * 3]


def test_parity_of_each_output_is_relative_to_its_own_standard_deviation():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(500, 2)).astype(np.float32) * [1.0, 0.01]
    expected = expected.astype(np.float32)
    within = expected + np.float32(1e-7)
    parities = check_outputs(expected, within, ("wide", "narrow"), None, "onnxruntime")
    assert [parity.output for parity in parities] == ["wide", "narrow"]
    assert worst_parity(parities).output == "narrow"
    # 0.0001 is 1 % of the standard deviation of ``narrow`` (0.01), which is above its limit. The
    # same difference in ``wide``, whose standard deviation is 1, would be within its limit.
    wrong = within.copy()
    wrong[:, 1] += np.float32(0.0001)
    with raises_code(ParityLost, "parity_limit") as caught:
        check_outputs(expected, wrong, ("wide", "narrow"), None, "onnxruntime")
    assert caught.value.failure.output == "narrow"
    assert "output 'narrow'" in str(caught.value)


def test_graph_without_one_of_two_outputs_raises_parity_shape():
    scores = np.zeros((5, 2), np.float32)
    with raises_code(ParityLost, "parity_shape"):
        check_outputs(scores, scores[:, 0], ("a", "b"), None, "onnxruntime")


def test_network_that_returns_a_mapping_has_the_same_graph_outputs(tmp_path):
    with_mapping = replace(MULTI_TASK, config={**MULTI_TASK.config, "returns": "mapping"})
    (served_graph,) = served_graphs(MULTI_TASK.signature)
    inputs = generate_inputs(MULTI_TASK.signature, MULTI_TASK.rows_of_tables(), 16, seed=5)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    scores = []
    for number, reference in enumerate((MULTI_TASK, with_mapping)):
        path = tmp_path / f"{number}.onnx"
        lower(reference.model().module, served_graph, "onnxruntime", path)
        scores.append(Session(path, threads=1).scores(arrays))
    np.testing.assert_array_equal(*scores)
