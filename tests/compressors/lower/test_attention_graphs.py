"""Attention in lowered graphs: every way to call torch's attention, also with empty histories."""

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

SIGNATURE = Signature(
    inputs=(IdInput(name="user", table="user"), PaddedBag(name="seen", table="item", shape=(5,))),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


class AttentionForms(nn.Module):
    """The sum of every way to call torch's attention on a history, with padding masked.

    If attention weights are returned too (``with_weights``), torch gives NaN for a row whose
    positions are all masked, so an empty history is not masked there.
    """

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(9, dim), nn.Embedding(30, dim)
        self.module = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.with_weights = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, batch_first=True)
        self.out = nn.Linear(dim, 1)

    def forward(self, user: Tensor, seen: Tensor) -> Tensor:
        x, is_padding = self.item(seen), seen == 0  # (rows, length, dim), (rows, length)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)  # (rows, 2, length, dim / 2)
        float_mask = torch.zeros_like(is_padding, dtype=x.dtype).masked_fill(
            is_padding, float("-inf")
        )
        outputs = (
            self.module(x, x, x, key_padding_mask=is_padding, need_weights=False)[0],
            self.with_weights(
                x, x, x, key_padding_mask=is_padding.logical_and(~is_padding.all(1, True))
            )[0],
            self.layer(x, src_key_padding_mask=is_padding),
            F.scaled_dot_product_attention(x, x, x, attn_mask=~is_padding[:, None]),
            F.scaled_dot_product_attention(x, x, x, attn_mask=float_mask[:, None], scale=0.3),
            F.scaled_dot_product_attention(heads, heads, heads, ~is_padding[:, None, None])
            .transpose(1, 2)
            .flatten(2),
            F.scaled_dot_product_attention(x, x, x, is_causal=True),
            F.scaled_dot_product_attention(
                torch.cat([heads, -heads], dim=1),
                heads,
                heads,
                float_mask[:, None, None],
                enable_gqa=True,
            )
            .transpose(1, 2)
            .unflatten(3, (2, -1))
            .flatten(2)[..., : x.shape[2]],
            F.scaled_dot_product_attention(self.user(user).unsqueeze(1), x, x),
        )
        return self.out(sum(output.mean(dim=1) for output in outputs))


def model() -> Model:
    """Return the network with weights from a seed."""
    torch.manual_seed(0)
    architecture = Architecture(path="test_attention_graphs:AttentionForms")
    return Model(AttentionForms().eval(), AttentionForms, Network(architecture=architecture))


def rows() -> dict[str, Tensor]:
    """Return histories from empty to full, and one with padding in the middle."""
    seen = torch.tensor(
        [[0, 0, 0, 0, 0], [7, 0, 0, 0, 0], [3, 4, 0, 0, 0], [9, 8, 7, 6, 5], [2, 0, 0, 0, 2]]
    )
    return {"user": torch.arange(5), "seen": seen}


@pytest.mark.parametrize(
    "target",
    # Graphs for different targets differ only in compressed weights, and there are none here.
    ["onnxruntime", pytest.param("tensorrt", marks=pytest.mark.nightly)],
)
def test_attention_in_graphs_has_the_scores_of_torch_also_for_empty_histories(
    target: TargetName, tmp_path
):
    (served_graph,) = served_graphs(SIGNATURE)
    lowered = lower(model().module, served_graph, target, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = lowered.wrapper(*(rows()[name] for name in input_names(SIGNATURE))).numpy()
    session = Session(tmp_path / "model.onnx", threads=1)
    scores = session.scores({name: tensor.numpy() for name, tensor in rows().items()})
    assert np.isfinite(expected).all()
    # The float32 sums have another order.
    np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_attention_layers_have_equal_scores_with_and_without_gradients():
    module = model().module
    with torch.no_grad():
        without_gradients = module(**rows())
    # The float32 sums have another order.
    torch.testing.assert_close(without_gradients, module(**rows()).detach(), atol=2e-6, rtol=0)


def test_compressed_network_with_attention_has_finite_scores_for_empty_histories(tmp_path):
    source = model()
    result = run(RowwiseInt8(), source, Bench(signature=SIGNATURE), tmp_path)
    with torch.no_grad():
        assert torch.isfinite(result.module(**rows())).all()
