"""Networks with positional inputs or one mapping, or with scores from a method like ``predict``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import ALONE, MULTI_TASK, NOT_ALONE, default_step
from multi_task_network import MultiTaskNet

from compressors.core.random_inputs import generate_inputs
from compressors.core.registries import METHODS
from compressors.core.runner import run
from compressors.core.scores import network_scores
from compressors.core.smoke_test import smoke_test
from compressors.distill.distill import Distill
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.prune.dense.sparse_2_4 import Sparse24
from infra.onnxruntime.sessions import Session


class PositionalNet(MultiTaskNet):
    """Takes its inputs by position."""

    def forward(self, first, second, third, /):
        return super().forward(user=first, item=second, price=third)


class MappingNet(MultiTaskNet):
    """Takes one mapping from names to tensors."""

    def forward(self, x):
        assert set(x) == {"user", "item", "price"}
        return super().forward(**x)


class PredictNet(MultiTaskNet):
    """Returns its scores from a method, which calls ``forward``."""

    def predict(self, user, item, price):
        scores, _ = self.forward(user, item, price)
        return scores

    def forward(self, user, item, price):
        return super().forward(user=user, item=item, price=price), user


def reference(network, **changes):
    """Return ``MULTI_TASK`` with another network class and changed fields of its signature."""
    signature = MULTI_TASK.signature.model_copy(update=changes)
    return replace(MULTI_TASK, network=network, signature=signature)


BY_POSITION = reference(PositionalNet, call="positions")
BY_MAPPING = reference(MappingNet, call="mapping")
BY_METHOD = reference(PredictNet, method="predict")
FORMS = pytest.mark.parametrize(
    "form", [BY_POSITION, BY_MAPPING, BY_METHOD], ids=["positions", "mapping", "method"]
)
# Methods that call the network in different places: for inputs of layers, lookups, reconstruction,
# channels, gradients, losses, and hints of the teacher's layers.
STEPS = (
    *(default_step(METHODS[kind]) for kind in ("static_int8", "prune_rows", "channels", "qat")),
    Sparse24(reconstruct=True),
    Distill(hints=("experts.0.0",), training=default_step(Distill).training),
)


def inputs():
    return generate_inputs(MULTI_TASK.signature, MULTI_TASK.rows_of_tables(), 9, seed=3)


@torch.no_grad()
def scores(model, form):
    return network_scores(model.module, inputs(), form.signature)


@FORMS
@pytest.mark.parametrize(
    "step",
    [
        *STEPS,
        # ``ALONE`` are the methods that change an uncompressed network.
        *(
            pytest.param(default_step(method), marks=pytest.mark.nightly)
            for method in ALONE
            if method not in NOT_ALONE and method.__name__ != "Equalize"  # it needs 'fold' first
        ),
    ],
    ids=lambda step: step.kind,
)
def test_step_gives_the_same_scores_as_for_a_network_with_keyword_arguments(form, step, tmp_path):
    results = []
    for name, each in (("keywords", MULTI_TASK), ("other", form)):
        # Hints come from the original, the network before compression.
        source = replace(each.model(), original=each.model().module)
        result = run(step, source, each.bench(tmp_path / name), tmp_path / f"{name}-out")
        results.append(scores(result, each))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@FORMS
def test_graph_takes_the_inputs_by_name(form, tmp_path):
    smoke_test(form.model().module, form.signature, "m:Net")
    (served,) = served_graphs(form.signature)
    lower(form.model().module, served, "onnxruntime", tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    assert session.inputs == ("user", "item", "price")
    result = session.scores({name: tensor.numpy() for name, tensor in inputs().items()})
    expected = scores(MULTI_TASK.model(), MULTI_TASK)
    expected[:, :2] = expected[:, :2].sigmoid()  # the graph returns probabilities
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-6)  # float32 rounding


def test_default_call_and_method_are_left_out_of_the_signature_in_json():
    assert not {"call", "method"} & MULTI_TASK.signature.model_dump().keys()
    assert BY_METHOD.signature.model_dump()["method"] == "predict"
    assert BY_MAPPING.signature.model_dump()["call"] == "mapping"
