"""Layers that do more than their class in torch does are left as they are, and the plan says so."""

from pathlib import Path

import pytest
import torch
from error_codes import raises_code
from models import Reference, default
from reason_codes import with_code
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
    """Bends its own output."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return F.relu(super().forward(input))


class Scaled(nn.Embedding):
    """Gives out its rows ten times as large."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return super().forward(input) * 10


class Own(nn.Module):
    """A table, a layer and a hook with custom forward code, each next to a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.city = Scaled(30, 8), nn.Embedding(20, 8)
        self.bent, self.hooked = ReluLinear(18, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 1)
        self.hooked.register_forward_hook(lambda module, args, output: 3 * output)

    def forward(self, user: Tensor, city: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), self.city(city), price], dim=1)
        score: Tensor = self.out(input=self.hooked(self.bent(x))).squeeze(1)
        return score


OWN = Reference(
    Own,
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
def test_a_layer_with_code_of_its_own_stays_and_the_others_answer_as_before(step, tmp_path: Path):
    bench = OWN.bench(tmp_path / "data")
    source = OWN.model()
    if isinstance(step, LowRankDense):  # for the one layer that is left it does not pay
        with raises_code(NothingToCompress, "units_missing") as caught:
            run(step, source, bench, tmp_path / "out")
        assert caught.value.fields["reasons"]["bent"] == (
            Reason("custom_forward", module_class="ReluLinear"),
        )
        return
    made = run(step, source, bench, tmp_path / "out")
    reasons = {line.module: line.reasons for line in made.plan.lines if line.format == "float32"}
    if isinstance(step, RowwiseInt8):
        with_code(reasons["user"], "custom_forward", module_class="Scaled")
    else:
        with_code(reasons["bent"], "custom_forward", module_class="ReluLinear")
        with_code(reasons["hooked"], "has_hooks")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "user": torch.randint(30, (200,), generator=generator),
        "city": torch.randint(20, (200,), generator=generator),
        "price": torch.randn(200, 2, generator=generator),
    }
    with torch.no_grad():
        expected, found = source.module(**inputs), made.module(**inputs)
    # 4 bits of one plain layer cost 16 per cent; a lost bend or factor at least 80.
    assert (found - expected).square().mean().sqrt() < 0.3 * expected.std()


@pytest.mark.parametrize("step", [Fold(), Equalize(), default(SmoothQuant)], ids=lambda s: s.kind)
def test_nothing_moves_into_or_out_of_such_a_layer(step, tmp_path: Path):
    with pytest.raises(NothingToCompress):
        run(step, OWN.model(), OWN.bench(tmp_path / "data"), tmp_path / "out")
