"""Dense layers that affect no output of a graph."""

from pathlib import Path

import onnx
import pytest
import torch
from models import only_served_graph
from torch import Tensor, nn

from compressors.contracts import DenseInput, IdInput, Output, Signature
from compressors.lower.export import lower
from compressors.lower.graph_weights import find_unused_layers

SIGNATURE = Signature(
    inputs=(IdInput(name="user", table="user"), DenseInput(name="price", shape=(1,))),
    outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),),
)


class GatedNet(nn.Module):
    """Returns a score, and computes two layers that do not change it.

    The weight of the gate is 0, so the outputs of ``ignored`` do not change the score, but the
    score reads them. The score does not read the outputs of ``unused``. The last level of a PLE
    (progressive layered extraction) network also computes such layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)
        self.used, self.ignored, self.unused = (nn.Linear(7, 4) for _ in range(3))
        self.out = nn.Linear(4, 1)
        self.register_buffer("gate", torch.zeros(1))

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        self.unused(x)
        score: Tensor = self.out(self.used(x) + self.gate * self.ignored(x))
        return score


@pytest.fixture
def network() -> GatedNet:
    torch.manual_seed(0)
    return GatedNet().eval()


def test_only_layers_whose_outputs_are_not_read_are_unused(network: GatedNet) -> None:
    names = ("used", "ignored", "unused", "out")
    assert find_unused_layers(network, only_served_graph(SIGNATURE), names) == ("unused",)


def test_graph_lacks_the_weights_of_unused_layers(network: GatedNet, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    lower(network, only_served_graph(SIGNATURE), "onnxruntime", path)
    initializers = onnx.load(path).graph.initializer
    stored = {item.name.removeprefix("model.") for item in initializers}
    assert {"used.weight", "ignored.weight", "out.weight"} <= stored
    assert "unused.weight" not in stored
