"""Scores of graphs equal those of torch in cases that exporters or runtimes can get wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import Reference, only_served_graph
from numpy.typing import NDArray
from signatures import replace_output
from torch import Tensor, nn

from compressors.contracts import DenseInput, Output, Signature, TargetName
from compressors.core.modules.output_calibration import Recalibration, attach
from compressors.lower.export import lower
from compressors.quantize.dense.static_int8 import packed_int8
from infra.onnxruntime.sessions import Session

SIGNATURE = Signature(
    inputs=(DenseInput(name="x", shape=(4,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
PROBABILITY = replace_output(SIGNATURE, form="probability")


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


class SigmoidOfSum(nn.Module):
    """A probability whose logit is the sum of the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.sum(dim=1))


def session(module: nn.Module, signature: Signature, target: TargetName, folder: Path) -> Session:
    """Export the target's graph and load it in ONNX Runtime (also graphs for TensorRT)."""
    path = folder / f"{target}.onnx"
    lower(module, only_served_graph(signature), target, path)
    return Session(path, 1)


def graph_scores(
    module: nn.Module, signature: Signature, target: TargetName, x: Tensor, folder: Path
) -> NDArray[np.float32]:
    """Return the scores of a target's graph for inputs ``x``."""
    return session(module, signature, target, folder).scores({"x": x.numpy()})


def test_recalibrated_probabilities_near_zero_are_equal_in_graph_and_torch(tmp_path: Path) -> None:
    # ``private`` returns a copy of the module tree in evaluation mode.
    module = Reference(SigmoidOfSum, PROBABILITY).model().private().module
    # Logits of -28 to -16 are mapped to -3 to 0; ONNX Runtime's sigmoid is 0 below -18.
    slope_and_offset = torch.tensor([0.25, 4.0])
    attach(module, Recalibration("platt", "probability", line=slope_and_offset))
    logits = torch.linspace(-28, -16, 25)
    x = (logits / 4).unsqueeze(1).expand(-1, 4).contiguous()
    scores = graph_scores(module, PROBABILITY, "onnxruntime", x, tmp_path)
    expected = 1 / (1 + np.exp(-(0.25 * logits.double().numpy() + 4)))
    # A relative rounding of 2^-24 in a probability moves its logit by 6e-8, and float32 logits
    # near 28 are 2e-6 apart.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_squeezed_score_has_one_number_per_row_for_one_and_several_rows(
    target: TargetName, tmp_path: Path
) -> None:
    module = Reference(SqueezedLinear, SIGNATURE).model().private().module
    layer, graph = module.layer, session(module, SIGNATURE, target, tmp_path)
    for rows in (1, 3):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
        scores = graph.scores({"x": x.numpy()})
        assert scores.shape == (rows,)
        expected = torch.sigmoid(x @ layer.weight[0] + layer.bias).detach().numpy()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)  # a float32 sum of four


@pytest.mark.parametrize(
    ("bias_in_steps", "target"),
    [
        # TensorRT and TensorRT-RTX have equal graphs, so all but one of RTX are ``nightly``.
        pytest.param(
            bias_in_steps,
            target,
            marks=pytest.mark.nightly if target == "tensorrt-rtx" and bias_in_steps != 0.7 else (),
        )
        for bias_in_steps in (0.3, 0.7, -0.7)
        for target in ("onnxruntime", "tensorrt", "tensorrt-rtx")
    ],
)
def test_bias_of_int8_layer_is_rounded_to_multiples_of_the_step(
    target: TargetName, bias_in_steps: float, tmp_path: Path
) -> None:
    """The range of inputs is so wide that the step of the products is larger than the bias.

    The step of the products is the scale of the inputs times that of the weights. The bias is
    ``bias_in_steps`` times the step.
    """
    module = Reference(Linear, SIGNATURE).model().private().module
    largest_input = torch.tensor(127.0 * 8)  # so inputs are rounded to multiples of 8
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor([[1.0, 0.0, -0.5, 0.0]]))
        step = 8 * packed_int8(module.layer, largest_input).weight_scale[0]
        module.layer.bias.copy_(bias_in_steps * step)
    module.layer = packed_int8(module.layer, largest_input)
    scores = graph_scores(module, SIGNATURE, target, torch.zeros(1, 4), tmp_path)
    expected = 1 / (1 + np.exp(-round(bias_in_steps) * float(step)))
    np.testing.assert_allclose(scores, [expected], rtol=0, atol=1e-6)
