"""Graphs of recurrent layers have the scores of torch at every length and batch size."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import only_served_graph
from torch import Tensor, nn

from compressors.contracts import IdInput, Output, SequenceInput, Signature
from compressors.contracts.targets.builder import BuildRequest, Profile
from compressors.lower.export import lower
from infra.onnxruntime.sessions import Session
from infra.tensorrt.engines import build_engine, find_installed_version

LONGEST, ITEMS = 7, 40
SIGNATURE = Signature(
    inputs=(
        SequenceInput(
            name="history", table="item", shape=(LONGEST,), lengths="count", padding="right"
        ),
        IdInput(name="item", table="item"),
    ),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


class RecurrentNet(nn.Module):
    """The product of a candidate item and of the state after the last item of a history.

    Args:
        kind: the class of the recurrent layer.
        starts: whether the first state depends on the candidate; zero otherwise.
        settings: other arguments of the layer.
    """

    def __init__(self, kind: type, *, starts: bool = False, **settings: Any) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 5)
        self.layer = kind(5, 4, **settings)
        self.starts, self.batch_first = starts, settings.get("batch_first", False)
        directions = 2 if settings.get("bidirectional") else 1
        self.first_states = settings.get("num_layers", 1) * directions
        self.out = nn.Linear(directions * 4 + 5, 1)

    def forward(self, history: Tensor, count: Tensor, item: Tensor) -> Tensor:
        """Return logits ``(rows,)``; ``history`` is ``(rows, length)``, ``count`` ``(rows,)``."""
        x, candidate = self.item(history), self.item(item)
        first = None
        if self.starts:
            state = candidate[:, :4].expand(self.first_states, -1, -1)
            first = (state, 2 * state) if isinstance(self.layer, nn.LSTM) else state
        x = x if self.batch_first else x.transpose(0, 1)
        self.layer.flatten_parameters()
        states, last = self.layer(x, first)
        states = states if self.batch_first else states.transpose(0, 1)
        at_end = states[torch.arange(count.shape[0]), (count - 1).long()]
        last = last[1] if isinstance(self.layer, nn.LSTM) else last
        joined = torch.cat([at_end, candidate * last.sum(dim=(0, 2)).unsqueeze(1)], dim=1)
        score: Tensor = self.out(torch.tanh(joined)).squeeze(1)
        return score


CASES = {
    "gru": (nn.GRU, {"batch_first": True}),
    "gru of two layers in both directions": (
        nn.GRU,
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3},
    ),
    "lstm with a first state": (nn.LSTM, {"starts": True, "batch_first": True}),
    "lstm of two layers in both directions without biases": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "bias": False},
    ),
    "rnn with relu": (nn.RNN, {"nonlinearity": "relu", "starts": True}),
    "rnn in both directions": (nn.RNN, {"bidirectional": True, "batch_first": True}),
}


def generate_rows(rows: int, length: int) -> dict[str, Tensor]:
    """Return random inputs whose longest list has ``length`` items."""
    generator = torch.Generator().manual_seed(rows + length)
    count = torch.randint(1, length + 1, (rows,), generator=generator)
    count[0] = length
    return {
        "history": torch.randint(0, ITEMS, (rows, length), generator=generator),
        "count": count,
        "item": torch.randint(0, ITEMS, (rows,), generator=generator),
    }


@pytest.mark.parametrize(
    ("case", "target"),
    [
        # Layers in both directions, and graphs for TensorRT-RTX, are tested nightly.
        *((case, "onnxruntime") for case in CASES if "directions" not in case),
        *(
            pytest.param(case, target, marks=pytest.mark.nightly)
            for case in CASES
            for target in ("onnxruntime", "tensorrt-rtx")
            if target != "onnxruntime" or "directions" in case
        ),
    ],
)
def test_graph_has_the_scores_of_the_network_at_every_length(
    case: str, target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    kind, settings = CASES[case]
    network = RecurrentNet(kind, **settings).eval()
    path = tmp_path / "model.onnx"
    lower(network, only_served_graph(SIGNATURE), target, path)
    graph = onnx.load(path).graph
    assert {node.op_type for node in graph.node} >= {kind.__name__}
    session = Session(path, threads=1)
    for rows, length in ((1, 1), (3, 4), (20, LONGEST)):
        inputs = generate_rows(rows, length)
        with torch.no_grad():
            expected = torch.sigmoid(network(**inputs)).numpy()
        scores = session.scores({name: tensor.numpy() for name, tensor in inputs.items()})
        # Float32 sums in another order, over at most 14 positions.
        np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.skipif(
    find_installed_version("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed"
)
@pytest.mark.parametrize("case", CASES)
def test_engine_of_recurrent_layers_is_built_for_lists_of_any_length(
    case: str, tmp_path: Path
) -> None:
    kind, settings = CASES[case]
    path = tmp_path / "model.onnx"
    lower(
        RecurrentNet(kind, **settings).eval(),
        only_served_graph(SIGNATURE),
        "tensorrt-rtx",
        path,
    )
    profiles = (
        Profile(input="history", low=(1, 1), best=(8, 4), high=(64, LONGEST)),
        Profile(input="count", low=(1,), best=(8,), high=(64,)),
        Profile(input="item", low=(1,), best=(8,), high=(64,)),
    )
    # ``packed_bytes`` is about the size of the weights, ``seconds`` the limit of the build.
    request = BuildRequest(
        target="tensorrt-rtx", onnx=str(path), profiles=profiles, packed_bytes=2000, seconds=120
    )
    assert Path(build_engine(request, tmp_path / "engine").path).is_file()
