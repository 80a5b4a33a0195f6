"""Exported models of torch-rechub and DeepCTR-Torch have the same scores after conversion."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_graphs import build_network, export
from torch import Tensor, nn

LIBRARIES = Path(sys.prefix) / "libraries"
"""The folder in which ``make .venv`` installs what ``tests/library_models.py`` imports."""
ROWS = 5
random = np.random.default_rng(0)
COLUMNS = {
    "user": random.integers(0, 50, ROWS),
    "item": random.integers(1, 80, ROWS),
    "genre": random.integers(0, 18, ROWS),
    "price": random.random(ROWS, np.float32),
    "age": random.integers(18, 80, ROWS).astype(np.float32),
    "history": random.integers(1, 80, (ROWS, 6)),
    "recent": random.integers(0, 80, (ROWS, 6)),
}
NUMBERS, IDS = ("price", "age"), ("user", "item", "genre")
INPUTS = {
    **dict.fromkeys(
        ("deep_fm", "dcn", "dcn_v2", "auto_int", "mmoe", "shared_bottom"), (*IDS, *NUMBERS)
    ),
    "wide_deep": (*IDS, *NUMBERS, "recent"),
    "din": (*IDS, "history"),
}
DEEPCTR = ("deep_fm", "xdeep_fm", "auto_int", "wide_deep", "nfm", "pnn", "fibinet")
CASES = [
    *(
        (name, dynamo)
        for name in (*INPUTS, *(f"deepctr_{n}" for n in DEEPCTR))
        for dynamo in (0, 1)  # exported by TorchScript or by torch.export
    ),
    ("deepctr_dcn", 1),  # TorchScript exports an If, which is not supported
]
TOLERANCE = 1e-6  # float32 sums in different orders; scores are probabilities


class MappingCall(nn.Module):
    """Calls a model with a mapping from names to positional tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        scores: Tensor = self.model(dict(zip(self.names, tensors, strict=True)))
        return scores


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "dynamo"), CASES)
def test_converted_export_of_a_library_model_has_the_same_scores(
    tmp_path: Path, name: str, dynamo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(LIBRARIES))
    import library_models

    model = getattr(library_models, name)().eval()
    if name in INPUTS:
        inputs = {column: torch.from_numpy(COLUMNS[column]) for column in INPUTS[name]}
        model = MappingCall(model, tuple(inputs)).eval()
    else:  # models of DeepCTR-Torch have one input: a matrix of all columns
        columns = [
            torch.from_numpy(COLUMNS[column]).reshape(ROWS, -1) for column in model.feature_index
        ]
        inputs = {"X": torch.cat([column.float() for column in columns], dim=1)}
    path = tmp_path / "model.onnx"
    export(model, inputs, ["score"], path, dynamo=bool(dynamo), by_name=name not in INPUTS)
    with torch.no_grad():
        expected, scores = model(*inputs.values()), build_network(onnx.load(path))(inputs)
    torch.testing.assert_close(scores, expected, rtol=TOLERANCE, atol=TOLERANCE)
