"""Failures that tests with random networks found, each reduced to a small network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from error_codes import raises_code
from safetensors.torch import save_file
from signatures import replace_output
from torch import Tensor, nn

from compressors.contracts import (
    Architecture,
    Bench,
    IdInput,
    Network,
    Output,
    PaddedBag,
    Signature,
    Split,
    TargetName,
)
from compressors.core.model import Model
from compressors.core.modules.output_calibration import Recalibration, attach
from compressors.core.runner import run
from compressors.errors.compression import ModelRefused
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.quantize.dense.float8_dense import Float8Dense
from compressors.quantize.dense.static_int8 import packed_int8
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session

USERS = Signature(
    inputs=(IdInput(name="user", table="table"),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
HISTORIES = Signature(
    inputs=(PaddedBag(name="seen", table="table", shape=(3,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


class NarrowLayerNet(nn.Module):
    """A dense layer with few inputs: in float8 its scales take more bytes than its weights."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(20, inputs), nn.Linear(inputs, 12)
        self.out = nn.Linear(12, 1)

    def forward(self, user: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.table(user))))


class MeanOfEmptyListNet(nn.Module):
    """A mean over the unpadded positions, which is 0 / 0 for an empty list."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 4), nn.Linear(4, 1)

    def forward(self, seen: Tensor) -> Tensor:
        is_item = (seen != 0).float().unsqueeze(-1)
        return self.out((self.table(seen) * is_item).sum(dim=1) / is_item.sum(dim=1))


class SqueezedScoreNet(nn.Module):
    """Squeezes its score, which removes the batch dimension of a single row."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 4), nn.Linear(4, 1)

    def forward(self, user: Tensor) -> Tensor:
        return self.out(self.table(user)).squeeze()


class ExtremeProbabilityNet(nn.Module):
    """A probability that is close to 0 for the first users and close to 1 for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 1)
        nn.init.zeros_(self.table.weight)

    def forward(self, user: Tensor) -> Tensor:
        return torch.sigmoid(self.table(user).squeeze(1) + 4.0 * (user - 10))


def model(network: type[nn.Module], **config: int) -> Model:
    """Return a network with weights from a seed."""
    torch.manual_seed(0)
    architecture = Architecture(path=f"{__name__}:{network.__name__}", config=config)
    return Model(network(**config).eval(), network, Network(architecture=architecture))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_lower_reports_the_codes_of_a_float8_layer_with_two_inputs(target: TargetName, tmp_path):
    (tmp_path / "rows").mkdir()
    users = {"user": torch.arange(20), "@label": torch.arange(20.0) % 2}
    save_file(users, tmp_path / "rows" / "data.safetensors")
    rows = Split(path=str(tmp_path / "rows"), sha256="0" * 64, rows=20)
    bench = Bench(signature=USERS, calibration=rows)
    compressed = run(
        Float8Dense(layers=("hidden",)), model(NarrowLayerNet, inputs=2), bench, tmp_path / "out"
    )
    (served_graph,) = served_graphs(USERS)
    (layer,) = lower(compressed.module, served_graph, target, tmp_path / "model.onnx").layers
    # ``layers`` names the initializer with each layer's codes (its float8 weights), which the audit
    # looks for. For this layer, lower() once named the scales, which are larger.
    assert layer.module == "hidden"
    assert layer.name.endswith("codes")


def test_network_with_nan_scores_is_refused_before_the_step(tmp_path):
    with raises_code(ModelRefused, "scores_not_finite", step="rowwise_int8"):
        run(RowwiseInt8(), model(MeanOfEmptyListNet), Bench(signature=HISTORIES), tmp_path)


def test_recalibrated_probability_near_zero_is_equal_in_the_graph(tmp_path):
    signature = replace_output(USERS, form="probability")
    module = model(ExtremeProbabilityNet).module
    slope_and_offset = torch.tensor([0.1, 0.0])
    attach(module, Recalibration("platt", "probability", line=slope_and_offset))
    (served_graph,) = served_graphs(signature)
    lowered = lower(module, served_graph, "onnxruntime", tmp_path / "model.onnx")
    users = torch.arange(20)
    scores = Session(tmp_path / "model.onnx", threads=1).scores({"user": users.numpy()})
    with torch.no_grad():
        expected = lowered.wrapper(users).numpy()
    # The result is sigmoid(0.1 * logit(p)). At a logit of 16, p is nearly 1, where float32 numbers
    # are 6e-8 apart; one such step of p changes the result by 0.006 to 0.009.
    np.testing.assert_allclose(scores[:10], expected[:10], atol=1e-5)
    np.testing.assert_allclose(scores, expected, atol=1e-2)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_graph_of_a_squeezed_score_returns_one_score_for_one_row(
    target: TargetName, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = SqueezedScoreNet().eval()
    # With policy "error", the NaN of refused rows would restore the batch dimension.
    clamped_input = (IdInput(name="user", table="table", out_of_range="clamp"),)
    served_graph = served_graphs(USERS.model_copy(update={"inputs": clamped_input}))[0]
    lower(model, served_graph, target, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    for rows in (1, 2, 5):
        users = torch.arange(rows)
        with torch.no_grad():
            expected = torch.sigmoid(model(users)).reshape(rows).numpy()
        scores = session.scores({"user": users.numpy()})
        assert scores.shape == (rows,)
        np.testing.assert_allclose(scores, expected, atol=1e-6)  # a float32 sum of four


class LargeInputNet(nn.Module):
    """An int8 layer whose inputs include a very large value, so its quantization step is large."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 4), nn.Linear(4, 1)
        with torch.no_grad():
            self.table.weight[-1] = 1e6

    def forward(self, user: Tensor) -> Tensor:
        return self.out(self.table(user))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "tensorrt-rtx"])
def test_int8_layer_with_a_bias_below_one_step_has_equal_scores_on_every_target(
    target: TargetName, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = LargeInputNet().eval()
    model.out = packed_int8(model.out, torch.tensor(1e6))
    assert float(model.out.bias.abs()) < 0.5 * float(model.out.weight_scale * 1e6 / 127)
    served_graph = served_graphs(USERS)[0]
    lower(model, served_graph, target, tmp_path / "model.onnx")
    users = torch.arange(19)
    with torch.no_grad():
        expected = torch.sigmoid(model(users)).squeeze(1).numpy()
    scores = Session(tmp_path / "model.onnx", threads=1).scores({"user": users.numpy()})
    np.testing.assert_allclose(scores, expected, atol=1e-6)  # all inputs and the bias round to 0
