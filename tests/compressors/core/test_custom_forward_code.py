"""Layers with custom forward code or hooks are kept unchanged, with a reason in the plan."""

from pathlib import Path

import pytest
import torch
from error_codes import raises_code
from models import Reference, default_step
from reason_codes import require_reason
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import DenseInput, IdInput, Output, Signature
from compressors.contracts.reasons import Reason
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.factorize.low_rank_dense import LowRankDense
from compressors.quantize.dense.float8_dense import Float8Dense
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.weight_int4 import WeightInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.rewrite.equalize import Equalize
from compressors.rewrite.fold import Fold
from compressors.rewrite.smooth_quant import SmoothQuant


class ReluLinear(nn.Linear):
    """A dense layer with a relu in its forward method."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return F.relu(super().forward(input))


class TenfoldEmbedding(nn.Embedding):
    """A table that multiplies its rows by ten in its forward method."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return super().forward(input) * 10


class CustomForwardNet(nn.Module):
    """A table and a layer with custom forward code, a layer with a hook, and plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.city = TenfoldEmbedding(30, 8), nn.Embedding(20, 8)
        self.with_relu, self.hooked = ReluLinear(18, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 1)
        self.hooked.register_forward_hook(lambda module, args, output: 3 * output)

    def forward(self, user: Tensor, city: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), self.city(city), price], dim=1)
        score: Tensor = self.out(input=self.hooked(self.with_relu(x))).squeeze(1)
        return score


CUSTOM_FORWARD = Reference(
    CustomForwardNet,
    Signature(
        inputs=(
            IdInput(name="user", table="user"),
            IdInput(name="city", table="city"),
            DenseInput(name="price", shape=(2,)),
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    ),
)


@pytest.mark.parametrize(
    "step",
    [StaticInt8(), WeightInt4(), Float8Dense(), LowRankDense(rank=0.4), RowwiseInt8()],
    ids=lambda step: step.kind,
)
def test_layers_with_custom_forward_code_are_kept_and_predictions_stay_close(step, tmp_path: Path):
    bench = CUSTOM_FORWARD.bench(tmp_path / "data")
    source = CUSTOM_FORWARD.model()
    if isinstance(step, LowRankDense):
        # Of the other dense layers, ``hooked`` has a hook, and ``out`` would take more bytes.
        with raises_code(NothingToCompress, "units_missing") as caught:
            run(step, source, bench, tmp_path / "out")
        assert caught.value.fields["reasons"]["with_relu"] == (
            Reason("custom_forward", module_class="ReluLinear"),
        )
        return
    result = run(step, source, bench, tmp_path / "out")
    reasons = {line.module: line.reasons for line in result.plan.lines if line.format == "float32"}
    if isinstance(step, RowwiseInt8):
        require_reason(reasons["user"], "custom_forward", module_class="TenfoldEmbedding")
    else:
        require_reason(reasons["with_relu"], "custom_forward", module_class="ReluLinear")
        require_reason(reasons["hooked"], "has_hooks")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "user": torch.randint(30, (200,), generator=generator),
        "city": torch.randint(20, (200,), generator=generator),
        "price": torch.randn(200, 2, generator=generator),
    }
    with torch.no_grad():
        expected, predictions = source.module(**inputs), result.module(**inputs)
    # 4 bits in the plain layer change predictions by 16 % of their spread; a lost relu or factor
    # by at least 80 %.
    assert (predictions - expected).square().mean().sqrt() < 0.3 * expected.std()


@pytest.mark.parametrize(
    "step", [Fold(), Equalize(), default_step(SmoothQuant)], ids=lambda s: s.kind
)
def test_rewriting_steps_skip_layers_with_custom_forward_code(step, tmp_path: Path):
    with pytest.raises(NothingToCompress):
        run(step, CUSTOM_FORWARD.model(), CUSTOM_FORWARD.bench(tmp_path / "data"), tmp_path / "out")
