"""Networks with other forms of a call.

They have positional inputs or one mapping, or scores from a method like ``predict``, or fail for a
batch of one row.

All are variants of ``MULTI_TASK`` of ``models.py``, whose class ``MultiTaskNet`` has the inputs
``user``, ``item`` and ``price``. Its three outputs are two logits and a probability.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from error_codes import TextMatching, raises_code
from models import ALONE, MULTI_TASK, default_step
from multi_task_network import MultiTaskNet

from compressors.contracts import JaggedBag, Output, Signature
from compressors.core.random_inputs import generate_inputs
from compressors.core.registries import METHODS
from compressors.core.runner import run
from compressors.core.scores import call_network, network_scores
from compressors.core.smoke_test import must_repeat_single_row, smoke_test
from compressors.distill.distill import Distill
from compressors.distill.recalibrate import Recalibrate
from compressors.errors.compression import ModelRefused
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
        scores, _ = self(user, item, price)  # a call, which runs the hooks of ``forward`` too
        return scores

    def forward(self, user, item, price):
        return super().forward(user=user, item=item, price=price), user


class SqueezingNet(MultiTaskNet):
    """Fails for one row, because ``squeeze`` then also removes the dimension of the rows."""

    def __init__(self, **arguments):
        super().__init__(**arguments, returns="tensor")

    def forward(self, user, item, price):
        scores = super().forward(user=user, item=item, price=price)
        return scores.unsqueeze(2).squeeze()[:, :3]  # from (rows, 3, 1)


def reference(network, **changes):
    """Return ``MULTI_TASK`` with another network class and changed fields of its signature."""
    signature = MULTI_TASK.signature.model_copy(update=changes)
    return replace(MULTI_TASK, network=network, signature=signature)


BY_POSITION = reference(PositionalNet, call="positions")
BY_MAPPING = reference(MappingNet, call="mapping")
BY_METHOD = reference(PredictNet, method="predict")
BY_TWO_ROWS = reference(SqueezingNet, repeat_single_row=True)
FORMS = pytest.mark.parametrize(
    "form", [BY_POSITION, BY_MAPPING, BY_METHOD], ids=["positions", "mapping", "method"]
)
# Methods that call the network in different places: for inputs of layers, lookups, reconstruction,
# channels, gradients, losses, and hints of the teacher's layers.
STEPS = (
    *(default_step(METHODS[kind]) for kind in ("static_int8", "prune_rows", "channels", "qat")),
    Sparse24(reconstruct=True),
    Distill(hints=("experts.0.0",), training=default_step(Distill).training),
    Recalibrate(method="best"),
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
            if method.__name__ != "Equalize"  # it needs 'fold' first
        ),
    ],
    ids=lambda step: step.kind,
)
def test_step_gives_the_same_scores_as_for_a_network_with_keyword_arguments(form, step, tmp_path):
    results = []
    for name, of_form in (("keywords", MULTI_TASK), ("other", form)):
        # Hints come from the original, the network before compression.
        source = replace(of_form.model(), original=of_form.model().module)
        result = run(step, source, of_form.bench(tmp_path / name), tmp_path / f"{name}-out")
        results.append(scores(result, of_form))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@FORMS
def test_graph_takes_the_inputs_by_name(form, tmp_path):
    smoke_test(form.model().module, form.signature, "m:Net")  # the class's path, for errors
    (served,) = served_graphs(form.signature)
    lower(form.model().module, served, "onnxruntime", tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    assert session.inputs == ("user", "item", "price")
    result = session.scores({name: tensor.numpy() for name, tensor in inputs().items()})
    expected = scores(MULTI_TASK.model(), MULTI_TASK)
    # The graph returns probabilities; the first two outputs of the network are logits.
    expected[:, :2] = expected[:, :2].sigmoid()
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-6)  # float32 rounding


def test_network_that_fails_for_one_row_needs_the_field_that_repeats_it():
    module, signature = BY_TWO_ROWS.model().module, BY_TWO_ROWS.signature
    without = signature.model_copy(update={"repeat_single_row": False})
    with raises_code(ModelRefused, "single_row_fails", problem=TextMatching("too many indices")):
        smoke_test(module, without, "m:Net")
    assert must_repeat_single_row(module, without)
    smoke_test(module, signature, "m:Net")
    assert not must_repeat_single_row(MULTI_TASK.model().module, MULTI_TASK.signature)


@torch.no_grad()
def test_repeated_row_has_the_scores_of_the_row_in_a_batch_and_of_the_graph(tmp_path):
    module = BY_TWO_ROWS.model().module
    (served,) = served_graphs(BY_TWO_ROWS.signature)
    lower(module, served, "onnxruntime", tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    of_batch = scores(BY_TWO_ROWS.model(), BY_TWO_ROWS)
    for row in range(9):
        only = {name: tensor[row : row + 1] for name, tensor in inputs().items()}
        of_row = network_scores(module, only, BY_TWO_ROWS.signature)
        # Float32 sums are added in another order if the batch has another size.
        torch.testing.assert_close(of_row, of_batch[row : row + 1], rtol=0, atol=1e-6)
        of_row[:, :2] = of_row[:, :2].sigmoid()
        result = session.scores({name: tensor.numpy() for name, tensor in only.items()})
        np.testing.assert_allclose(result, of_row.numpy(), atol=1e-6)


@pytest.mark.parametrize("layout", ["offsets", "lengths"])
def test_repeated_row_of_a_jagged_bag_has_its_ids_twice(layout):
    bag = JaggedBag(name="tags", table="tags", shape=(4,), layout=layout)
    output = Output(name="click", kind="ctr", form="logit", label="click", metric="auc")
    signature = Signature(inputs=(bag,), outputs=(output,), repeat_single_row=True)
    received = {}

    class Bag(torch.nn.Module):
        def forward(self, tags, **bounds):
            received.update(tags=tags, **bounds)
            return {"click": torch.arange(2.0), "other": (torch.zeros(2, 1),)}

    bounds = {"offsets": [0], "lengths": [3]}[layout]
    single_row = {"tags": torch.tensor([5, 6, 7]), f"tags_{layout}": torch.tensor(bounds)}
    returned = call_network(Bag(), single_row, signature)
    assert received["tags"].tolist() == [5, 6, 7, 5, 6, 7]
    assert received[f"tags_{layout}"].tolist() == {"offsets": [0, 3], "lengths": [3, 3]}[layout]
    assert returned["click"].tolist() == [0.0]
    assert returned["other"][0].shape == (1, 1)


def test_defaults_of_a_call_are_left_out_of_the_signature_in_json():
    assert not {"call", "method", "repeat_single_row"} & MULTI_TASK.signature.model_dump().keys()
    assert BY_METHOD.signature.model_dump()["method"] == "predict"
    assert BY_MAPPING.signature.model_dump()["call"] == "mapping"
