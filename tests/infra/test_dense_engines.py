"""TensorRT-RTX engines of compressed dense layers: packed weights and 2:4 sparsity.

The audit of an engine reads from the builder's log whether the weights stay packed, and the outcome
of sparsity: "used" if the builder chose sparse kernels, "not used" if it chose only dense
ones, and "unknown" if its log does not report the choice.

A ``Profile`` has the smallest (``low``), optimal (``best``) and largest (``high``) shape of an
input.
"""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Architecture, Bench, DenseInput, Network, Output, Signature, Split
from compressors.contracts.targets.builder import BuildRequest, Profile
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.steps.step import Step
from compressors.core.units import stored_bytes
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.prune.dense.sparse_2_4 import Sparse24, sparse_layers
from compressors.quantize.dense.float8_dense import Float8Dense
from compressors.quantize.dense.weight_int4 import WeightInt4
from compressors.quantize.dense.weight_int8 import WeightInt8
from infra.tensorrt.audit import judge_sparsity
from infra.tensorrt.engines import Engine, build_engine, find_installed_version

needs_rtx = pytest.mark.skipif(
    find_installed_version("tensorrt-rtx") is None,
    reason="TensorRT-RTX is not installed; pip install 'recpress[tensorrt-rtx]'",
)
# 500 is not a multiple of 64 or 128, the sizes of blocks of weights that share a scale.
INPUTS, WIDTH = 500, 512
SIGNATURE = Signature(
    inputs=(DenseInput(name="x", shape=(INPUTS,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


class Tower(nn.Module):
    """Two wide layers, with nearly all of the bytes, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        deep = torch.relu(self.second(torch.relu(self.first(x))))
        score: Tensor = self.out(deep).squeeze(1)
        return score


def compress(step: Step, tmp_path) -> Model:
    """Apply a step to a random ``Tower`` with 64 random calibration rows."""
    torch.manual_seed(0)
    description = Network(architecture=Architecture(path="test:Tower", config={}))
    source = Model(Tower().eval(), Tower, description)
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = {"x": torch.randn(64, INPUTS), "@label": torch.zeros(64)}
    save_file(rows, folder / "data.safetensors")
    calibration = Split(path=str(folder), sha256="0" * 64, rows=64)
    return run(
        step, source, Bench(signature=SIGNATURE, calibration=calibration), tmp_path / "compressed"
    )


def build(model: Model, tmp_path, layers: tuple[str, ...] = ()) -> Engine:
    """Lower a model and build its engine; ``layers`` are the layers with 2:4 zeros."""
    path = tmp_path / "model.onnx"
    (served_graph,) = served_graphs(SIGNATURE)
    lower(model.module, served_graph, "tensorrt-rtx", path)
    request = BuildRequest(
        target="tensorrt-rtx",
        onnx=str(path),
        profiles=(Profile(input="x", low=(1, INPUTS), best=(64, INPUTS), high=(256, INPUTS)),),
        packed_bytes=stored_bytes(model.module),
        sparse_layers=layers,
        seconds=120,
    )
    return build_engine(request, tmp_path / "out")


@needs_rtx
@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (WeightInt4(), "int4"),
        pytest.param(WeightInt4(block=0, scale="float32"), "int4", marks=pytest.mark.nightly),
        (WeightInt4(block=128, activations="int8"), "int4"),
        pytest.param(WeightInt8(), "int8", marks=pytest.mark.nightly),
        (WeightInt8(block=64, activations="float32"), "int8"),
        pytest.param(Float8Dense(), "fp8", marks=pytest.mark.nightly),
        (Float8Dense(scales="layer"), "fp8"),
    ],
    ids=[
        "int4",
        "int4 with a scale per row",
        "int4 in blocks of 128 with int8 activations",
        "int8",
        "int8 in blocks of 64 with float32 activations",
        "fp8",
        "fp8 with a scale per layer",
    ],
)
def test_engine_stores_dense_weights_packed(step, kind, tmp_path):
    model = compress(step, tmp_path)
    audit = build(model, tmp_path).audit
    assert audit.layer_types[kind] >= 3
    # Measured: the engine's weights take 5 KB less than the stored bytes (TensorRT removes padding)
    # to 2.4 KB more. The 518,000 weights in float16 would take over 500 KB more than stored.
    assert audit.weights_bytes < stored_bytes(model.module) + 8_192
    assert audit.sparsity is None


@needs_rtx
def test_engine_of_sparse_layers_reports_that_the_log_has_no_kernel_choice(tmp_path):
    model = compress(Sparse24(), tmp_path)
    layers = sparse_layers(model.module, model.plan)
    assert layers == ("first", "second", "out")
    audit = build(model, tmp_path, layers).audit
    assert audit.sparsity == "unknown"
    assert "3 layers have 2:4 zeros" in audit.sparsity_reason
    request = json.loads((tmp_path / "out" / "build.json").read_text())["request"]
    assert request["sparse_layers"] == ["first", "second", "out"]


# Lines in the logs of TensorRT 10; ``lines_of_version_8`` returns those of TensorRT 8.
FOUND_LINE = "(Sparsity) Found {} layer(s) eligible to use sparse tactics"
CHOSE_LINE = "(Sparsity) Chose {} layer(s) using sparse tactics"


def lines_of_version_8(eligible: str, picked: str) -> list[str]:
    """Return the log lines with the names of eligible layers and of layers on sparse kernels."""
    return [
        f"(Sparsity) Layers eligible for sparse math: {eligible}",
        f"(Sparsity) TRT inference plan picked sparse implementation for layers: {picked}",
    ]


@pytest.mark.parametrize(
    ("log", "outcome", "reason"),
    [
        (lines_of_version_8("first, second + relu", "second + relu"), "used", "1 of 3 layers"),
        (
            lines_of_version_8("first, second", ""),
            "not used",
            "2 were eligible .* dense kernels were faster",
        ),
        (lines_of_version_8("", ""), "not used", "none was eligible"),
        (
            [FOUND_LINE.format(2) + ": first, second", CHOSE_LINE.format(2) + ": first, second"],
            "used",
            "2 of 3 layers",
        ),
        ([FOUND_LINE.format(2), CHOSE_LINE.format(0)], "not used", "2 were eligible"),
        (  # the builder chose kernels twice: the last choice counts
            [
                FOUND_LINE.format(9),
                CHOSE_LINE.format(9),
                FOUND_LINE.format(2),
                CHOSE_LINE.format(0),
            ],
            "not used",
            "2 were eligible",
        ),
        (["Total Weights Memory: 1"], "unknown", "compare the latency"),
    ],
)
def test_judge_sparsity_reads_the_outcome_from_the_log(log, outcome, reason):
    judged, judged_reason = judge_sparsity(
        ["something else", *log], sparse_layers=3, version="10.9"
    )
    assert judged == outcome
    assert judged_reason is not None
    assert re.search(reason, judged_reason)


def test_judge_sparsity_returns_none_without_sparse_layers():
    log = lines_of_version_8("first", "first")
    assert judge_sparsity(log, sparse_layers=0, version="10.9") == (None, None)
