"""``recpress new --onnx``: drafts that are written from ONNX files.

A draft is the folder of a bundle before it is packed.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click_data import write_clicks
from error_codes import raises_code
from onnx import helper
from onnx_graphs import build_model

from compressors.contracts import ONNX_NETWORK
from compressors.core.units import Unit
from compressors.errors.compression import ModelRefused
from compressors.errors.inspection import InspectionFailed
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.operators.registry import OPERATORS, Operator
from infra.errors import DraftRefused
from tasks.bundles.bundle_ref import resolve
from tasks.bundles.loading import load_bundle
from tasks.bundles.new_draft import DraftRequest, NewDraft, new_draft
from tasks.bundles.packing import pack

# A click model that examples/keras_clicks.py trained, with tables of 300 users and 400 items.
KERAS = Path(__file__).parents[1] / "onnx_files" / "keras_clicks.onnx"
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clicks(tmp_path_factory.mktemp("clicks") / "data")


def draft(work_folder: Path, data: Path, model: onnx.ModelProto | Path, **options: Any) -> NewDraft:
    """Write a draft from a model."""
    path = work_folder / "Click Model.onnx"
    if isinstance(model, Path):
        shutil.copy(model, path)
    else:
        onnx.save(model, path)
    request = DraftRequest(
        folder=work_folder / "new",
        model=None,
        onnx=path,
        data=data,
        **{"labels": {"click": "click"}, **options},
    )
    return new_draft(request)


def floats(*shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


WEIGHTS = {"user.weight": floats(300, 4), "item.weight": floats(400, 4), "out.weight": floats(4, 1)}


def two_outputs() -> onnx.ModelProto:
    """Return a model with an int32 input, a column of one id, and two named outputs."""
    nodes = [
        helper.make_node("Gather", ["user.weight", "user"], ["u"]),
        helper.make_node("Gather", ["item.weight", "item"], ["i"]),
        helper.make_node("Squeeze", ["i", "one"], ["flat"]),
        helper.make_node("Mul", ["u", "flat"], ["both"]),
        helper.make_node("MatMul", ["both", "out.weight"], ["like"]),
        helper.make_node("Sigmoid", ["like"], ["click/score"]),
    ]
    inputs = {"user": np.zeros(2, np.int32), "item": np.zeros((2, 1), np.int64)}
    weights = {**WEIGHTS, "one": np.array([1])}
    return build_model(nodes, inputs, ["click/score", "like"], weights)


def test_model_of_keras_becomes_a_bundle_with_the_scores_of_onnx_runtime(
    work_folder: Path, data: Path
) -> None:
    written = draft(work_folder, data, KERAS)
    assert written.draft.name == "click-model"
    assert written.draft.network.architecture.path == ONNX_NETWORK
    kinds = {item.name: item.kind for item in written.draft.signature.inputs}
    assert kinds == {"user": "id", "item": "id", "history": "padded_bag", "price": "dense"}
    assert written.rows_of_table == {"users_1": 300, "items_3": 400}
    (output,) = written.draft.signature.outputs
    assert (output.kind, output.form) == ("ctr", "probability")
    pack(work_folder / "new")
    units = Unit.of(load_bundle(resolve("click-model")).model.module)
    assert {unit.name for unit in units} == {"users_1", "items_3", "hidden_1", "click_1"}


def test_named_outputs_of_the_graph_are_the_outputs(work_folder: Path, data: Path) -> None:
    labels = {"click_score": "click", "like": "liked"}
    written = draft(work_folder, data, two_outputs(), labels=labels, name="two")
    outputs = written.draft.signature.outputs
    assert [(item.name, item.form, item.label) for item in outputs] == [
        ("click_score", "probability", "click"),
        ("like", "logit", "liked"),
    ]
    assert {item.name: item.kind for item in written.draft.signature.inputs} == {
        "user": "id",
        "item": "id",
    }
    pack(work_folder / "new")


def test_columns_with_other_names_than_the_input_must_be_given(
    work_folder: Path, data: Path
) -> None:
    nodes = [
        helper.make_node("Gather", ["item.weight", "ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["y"], keepdims=0),
    ]
    inputs = {"ids": np.zeros((2, 2), np.int64)}
    weights = {**WEIGHTS, "axes": np.array([1, 2])}
    model = build_model(nodes, inputs, weights=weights)
    with raises_code(InspectionFailed, "arguments_unknown", names=("ids",)):
        draft(work_folder, data, model)
    written = draft(work_folder, data, model, inputs={"ids": ("user", "item")})
    (item,) = written.draft.signature.inputs
    assert (item.kind, item.columns) == ("id", ("user", "item"))


def test_network_with_other_scores_than_onnx_runtime_is_refused(
    work_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "Sigmoid", Operator(torch.tanh))
    with raises_code(OnnxRefused, "scores_differ", output="click_score"):
        draft(work_folder, data, two_outputs(), labels={"like": "liked"})
    assert not (work_folder / "new").exists()


@pytest.mark.parametrize(
    "options",
    [{"model": "shop:Net"}, {"weights": Path("w.safetensors")}, {"config": '{"dim": 8}'}],
)
def test_onnx_with_the_options_of_a_module_is_refused(
    work_folder: Path, data: Path, options: dict[str, Any]
) -> None:
    request = DraftRequest(
        **{"folder": work_folder / "new", "model": None, "onnx": KERAS, "data": data, **options},
        labels={"click": "click"},
    )
    with raises_code(DraftRefused, "model_sources_conflict"):
        new_draft(request)


def test_stored_configuration_with_an_unknown_operator_is_refused(
    work_folder: Path, data: Path
) -> None:
    draft(work_folder, data, two_outputs(), labels={"like": "liked"}, name="two")
    path = work_folder / "new" / "model.json"
    path.write_text(path.read_text().replace('"Sigmoid"', '"Loop"'))
    with raises_code(ModelRefused, "construction_failed", architecture=ONNX_NETWORK):
        pack(work_folder / "new")
