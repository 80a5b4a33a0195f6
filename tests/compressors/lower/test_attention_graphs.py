"""Attention in lowered graphs: every form of it, also for rows whose places are all masked."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import (
    Architecture,
    Bench,
    IdInput,
    Network,
    Output,
    PaddedBag,
    Signature,
    TargetName,
)
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import input_names, served_graphs
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session

SCHEMA = Signature(
    inputs=(IdInput(name="user", table="user"), PaddedBag(name="seen", table="item", shape=(5,))),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


class Attending(nn.Module):
    """A history read by torch's attention in each of its forms, with padding masked."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(9, dim), nn.Embedding(30, dim)
        self.module = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.weighing = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, batch_first=True)
        self.out = nn.Linear(dim, 1)

    def forward(self, user: Tensor, seen: Tensor) -> Tensor:
        x, away = self.item(seen), seen == 0  # (rows, length, dim), (rows, length)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)  # (rows, 2, length, dim / 2)
        low = torch.zeros_like(away, dtype=x.dtype).masked_fill(away, float("-inf"))
        found = (
            self.module(x, x, x, key_padding_mask=away, need_weights=False)[0],
            self.weighing(x, x, x, key_padding_mask=away.logical_and(~away.all(1, True)))[0],
            self.layer(x, src_key_padding_mask=away),
            F.scaled_dot_product_attention(x, x, x, attn_mask=~away[:, None]),
            F.scaled_dot_product_attention(x, x, x, attn_mask=low[:, None], scale=0.3),
            F.scaled_dot_product_attention(heads, heads, heads, ~away[:, None, None])
            .transpose(1, 2)
            .flatten(2),
            F.scaled_dot_product_attention(x, x, x, is_causal=True),
            F.scaled_dot_product_attention(
                torch.cat([heads, -heads], dim=1), heads, heads, low[:, None, None], enable_gqa=True
            )
            .transpose(1, 2)
            .unflatten(3, (2, -1))
            .flatten(2)[..., : x.shape[2]],
            F.scaled_dot_product_attention(self.user(user).unsqueeze(1), x, x),
        )
        return self.out(sum(part.mean(dim=1) for part in found))


def model() -> Model:
    """The network with weights from a seed."""
    torch.manual_seed(0)
    architecture = Architecture(path="test_attention_graphs:Attending")
    return Model(Attending().eval(), Attending, Network(architecture=architecture))


def rows() -> dict[str, Tensor]:
    """Histories from empty to full, one padded in the middle."""
    seen = torch.tensor(
        [[0, 0, 0, 0, 0], [7, 0, 0, 0, 0], [3, 4, 0, 0, 0], [9, 8, 7, 6, 5], [2, 0, 0, 0, 2]]
    )
    return {"user": torch.arange(5), "seen": seen}


@pytest.mark.parametrize(
    "target",
    # Targets differ in how packed weights are written down, and nothing is packed here.
    ["onnxruntime", pytest.param("tensorrt", marks=pytest.mark.nightly)],
)
def test_attention_scores_an_empty_history_as_torch_does(target: TargetName, tmp_path):
    (form,) = served_graphs(SCHEMA)
    lowered = lower(model().module, form, target, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = lowered.served(*(rows()[name] for name in input_names(SCHEMA))).numpy()
    found = Session(tmp_path / "model.onnx", 1).scores({k: x.numpy() for k, x in rows().items()})
    assert np.isfinite(expected).all()
    # float32 sums in another order
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_attention_layers_score_the_same_with_and_without_gradients():
    module = model().module
    with torch.no_grad():
        without = module(**rows())
    # float32 sums in another order
    torch.testing.assert_close(without, module(**rows()).detach(), atol=2e-6, rtol=0)


def test_a_network_with_attention_over_empty_histories_can_be_compressed(tmp_path):
    source = model()
    result = run(RowwiseInt8(), source, Bench(signature=SCHEMA), tmp_path)
    with torch.no_grad():
        assert torch.isfinite(result.module(**rows())).all()
