"""Values that served graphs must share with torch where exporters and runtimes differ from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import Reference, whole
from numpy.typing import NDArray
from signatures import with_output
from torch import Tensor, nn

from compressors.contracts import DenseInput, Output, Signature, TargetName
from compressors.core.modules.output_calibration import Recalibration, attach
from compressors.lower.export import lower
from compressors.quantize.dense.static_int8 import packed_int8
from infra.onnxruntime.sessions import Session

SCHEMA = Signature(
    inputs=(DenseInput(name="x", shape=(4,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
PROBABILITY = with_output(SCHEMA, form="probability")


class Linear(nn.Module):
    """One dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.layer(x)
        return score


class SqueezedLinear(Linear):
    """A score without any dimension of size 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


class RareProbability(nn.Module):
    """The probability whose logit is the sum of the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.sum(dim=1))


def session(module: nn.Module, signature: Signature, target: TargetName, folder: Path) -> Session:
    """The target's graph in ONNX Runtime, which runs TensorRT's forms too."""
    path = folder / f"{target}.onnx"
    lower(module, whole(signature), target, path)
    return Session(path, 1)


def graph_scores(
    module: nn.Module, signature: Signature, target: TargetName, x: Tensor, folder: Path
) -> NDArray[np.float32]:
    return session(module, signature, target, folder).scores({"x": x.numpy()})


def test_recalibrated_probabilities_next_to_zero_are_those_of_torch(tmp_path: Path) -> None:
    module = Reference(RareProbability, PROBABILITY).model().private().module
    # Logits of -28 to -16 become -3 to 0: ONNX Runtime's own sigmoid is 0 below -18.
    line = torch.tensor([0.25, 4.0])
    attach(module, Recalibration("platt", "probability", line=line))
    logits = torch.linspace(-28, -16, 25)
    x = (logits / 4).unsqueeze(1).expand(-1, 4).contiguous()
    found = graph_scores(module, PROBABILITY, "onnxruntime", x, tmp_path)
    expected = 1 / (1 + np.exp(-(0.25 * logits.double().numpy() + 4)))
    # A relative rounding of 2^-24 in a probability moves its logit by 6e-8, and float32 logits
    # near 28 are 2e-6 apart.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_squeezed_score_has_one_number_per_row_for_requests_of_any_size(
    target: TargetName, tmp_path: Path
) -> None:
    module = Reference(SqueezedLinear, SCHEMA).model().private().module
    layer, graph = module.layer, session(module, SCHEMA, target, tmp_path)
    for rows in (1, 3):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
        found = graph.scores({"x": x.numpy()})
        assert found.shape == (rows,)
        expected = torch.sigmoid(x @ layer.weight[0] + layer.bias).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # one float32 sum of four


@pytest.mark.parametrize(
    ("share", "target"),
    [
        # Graphs for TensorRT and for TensorRT-RTX are the same: the default tier has one of these.
        pytest.param(
            share,
            target,
            marks=pytest.mark.nightly if target == "tensorrt-rtx" and share != 0.7 else (),
        )
        for share in (0.3, 0.7, -0.7)
        for target in ("onnxruntime", "tensorrt", "tensorrt-rtx")
    ],
)
def test_the_bias_of_an_int8_layer_is_rounded_to_whole_steps(
    target: TargetName, share: float, tmp_path: Path
) -> None:
    """With inputs this wide a step of the products is larger than the bias."""
    module = Reference(Linear, SCHEMA).model().private().module
    end = torch.tensor(127.0 * 8)  # inputs in steps of 8
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor([[1.0, 0.0, -0.5, 0.0]]))
        step = 8 * packed_int8(module.layer, end).weight_scale[0]
        module.layer.bias.copy_(share * step)
    module.layer = packed_int8(module.layer, end)
    found = graph_scores(module, SCHEMA, target, torch.zeros(1, 4), tmp_path)
    expected = 1 / (1 + np.exp(-round(share) * float(step)))
    np.testing.assert_allclose(found, [expected], rtol=0, atol=1e-6)
