"""A click model whose first layer reads inputs of two ranges, and rows to calibrate it."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import (
    Architecture,
    Bench,
    DenseInput,
    IdInput,
    Network,
    Output,
    Signature,
    Split,
)
from compressors.core.model import Model

ROWS = 2048
DIM = 16


class CountsAndVectors(nn.Module):
    """A layer over an embedding and dense features, followed by an output layer."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.user = nn.Embedding(500, DIM)
        self.first = nn.Linear(DIM + features, 32)
        self.out = nn.Linear(32, 1)

    def forward(self, user: Tensor, counts: Tensor) -> Tensor:
        x = torch.cat([self.user(user), counts], dim=1)
        out: Tensor = self.out(torch.relu(self.first(x))).squeeze(1)
        return out


def model_and_bench(tmp_path: Path, largest: float, spread: float = 0.05) -> tuple[Model, Bench]:
    """Build a model and calibration rows whose inputs have two ranges.

    Embeddings are normal with the standard deviation ``spread``; features are uniform from 0 to
    ``largest``.
    """
    torch.manual_seed(0)
    module = CountsAndVectors().eval()
    with torch.no_grad():
        module.user.weight.mul_(spread)
        # As in a trained network, weights are smaller for inputs of larger range, so that both
        # embeddings and features affect the output.
        module.first.weight[:, :DIM] = torch.randn(32, DIM) * 0.05 / spread
        module.first.weight[:, DIM:] = torch.randn(32, 3) * 0.2 / largest
    signature = Signature(
        inputs=(
            IdInput(name="user", table="user"),
            DenseInput(name="counts", shape=(3,)),
        ),
        outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),),
    )
    columns = {
        "user": torch.randint(0, 500, (ROWS,)),
        "counts": torch.rand(ROWS, 3) * largest,
        "@label": torch.randint(0, 2, (ROWS,)).float(),
    }
    folder = tmp_path / "rows"
    folder.mkdir()
    save_file(columns, folder / "data.safetensors")
    split = Split(path=str(folder), sha256="0" * 64, rows=ROWS)
    network = Network(architecture=Architecture(path="mixed_ranges:CountsAndVectors"))
    return Model(module, CountsAndVectors, network), Bench(signature=signature, calibration=split)
