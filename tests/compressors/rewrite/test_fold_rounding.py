"""``fold`` is checked against float32's own rounding where made-up scores hardly differ."""

from pathlib import Path

import pytest
import torch
from error_codes import raises_code
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import (
    Architecture,
    Bench,
    DenseInput,
    IdInput,
    Network,
    Output,
    Signature,
)
from compressors.core.model import Model
from compressors.core.modules.formats import FoldedNorm
from compressors.core.runner import run
from compressors.errors.steps import StepRefused
from compressors.prune.structure.narrowing import gap_of
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.rewrite.fold import Fold

USERS, ITEMS, DIM, DENSE = 60, 40, 8, 3
MEAN, DEVIATION = 1e5, 100.0
"""Raw numbers such as times or prices: far from the made-up rows of a check, which are near 0."""


class NormedTower(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, DIM)
        self.first, self.norm = nn.Linear(DIM + DENSE, 32), nn.BatchNorm1d(32)
        self.second, self.again = nn.Linear(32, 32), nn.BatchNorm1d(32)
        self.last = nn.Linear(32, DIM)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(torch.cat([self.table(ids), dense], dim=1))))
        return F.normalize(self.last(torch.relu(self.again(self.second(x)))), dim=1)


class NormedTowers(nn.Module):
    """A cosine over a temperature, from raw numbers that only the batch norms bring near 1."""

    def __init__(self, output: str = "logit") -> None:
        super().__init__()
        self.query, self.item = NormedTower(USERS), NormedTower(ITEMS)
        self.output = output

    def forward(self, user: Tensor, item: Tensor, seen: Tensor, price: Tensor) -> Tensor:
        score = (self.query(user, seen) * self.item(item, price)).sum(dim=1) / 0.05
        return torch.sigmoid(score) if self.output == "probability" else score


def signature(output: str) -> Signature:
    return Signature(
        inputs=(
            IdInput(name="user", table="query.table"),
            IdInput(name="item", table="item.table"),
            DenseInput(name="seen", shape=(DENSE,)),
            DenseInput(name="price", shape=(DENSE,)),
        ),
        outputs=(Output(name="label", kind="ctr", form=output, label="label", metric="auc"),),
    )


def rows(count: int, seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(USERS, (count,), generator=drawn),
        "item": torch.randint(ITEMS, (count,), generator=drawn),
        "seen": MEAN + DEVIATION * torch.randn(count, DENSE, generator=drawn),
        "price": MEAN + DEVIATION * torch.randn(count, DENSE, generator=drawn),
    }


def towers(output: str) -> Model:
    """A network whose norms have seen rows, so that their means are those of its inputs."""
    torch.manual_seed(0)
    module = NormedTowers(output).train()
    with torch.no_grad():
        for batch in range(60):
            module(**rows(256, batch))
    module.eval().requires_grad_(False)
    architecture = Architecture(path="tests:NormedTowers", config={"output": output})
    return Model(module, NormedTowers, Network(architecture=architecture))


@pytest.mark.parametrize(
    ("output", "before"),
    [
        # In the default tier each output and each format once.
        pytest.param(
            output,
            before,
            id=f"{output}-{before.kind if before else 'float32'}",
            marks=() if (place + turn) % 2 else pytest.mark.nightly,
        )
        for turn, output in enumerate(("logit", "probability"))
        for place, before in enumerate((None, RowwiseInt8(), RowwiseInt4()))
    ],
)
def test_fold_is_not_refused_where_rounding_is_a_large_share_of_a_small_spread(
    output: str, before: RowwiseInt8 | RowwiseInt4 | None, tmp_path: Path
) -> None:
    bench, source = Bench(signature=signature(output)), towers(output)
    if before is not None:  # what a preset does first
        source = run(before, source, bench, tmp_path / "packed")
    folded = run(Fold(), source, bench, tmp_path / "folded")
    norms = [m for m in folded.module.modules() if isinstance(m, nn.BatchNorm1d | FoldedNorm)]
    assert [type(norm) for norm in norms] == [FoldedNorm] * 4
    inputs = rows(500, seed=1000)  # as the network was trained on
    with torch.no_grad():
        gap = folded.module(**inputs) - source.private().module(**inputs)
    # Sums of numbers of 1e5 that cancel to about 1e2 keep 7 - 3 digits of float32; then cosines
    # over a temperature of 0.05.
    assert float(gap.abs().max()) < 0.02


def test_a_wrong_fold_is_refused_also_where_rounding_is_a_large_share_of_the_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 32 factors of each norm is 1 % off: far above rounding, far below the sums."""
    from compressors.rewrite import fold

    real = fold.scaled_outputs
    factor = torch.ones(32, dtype=torch.float64)
    factor[0] = 1.01

    def slightly_wrong(
        weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        return real(weight, bias, scale * factor, shift)

    monkeypatch.setattr(fold, "scaled_outputs", slightly_wrong)
    with raises_code(StepRefused, "folded_scores_differ"):
        run(Fold(), towers("logit"), Bench(signature=signature("logit")), tmp_path / "folded")


def test_a_probability_near_one_may_move_by_the_last_step_of_float32() -> None:
    """In logits, one step of float32 at 0.99999 is 0.6 % of 1: more than the tolerance."""
    shown = signature("probability")
    expected = torch.tensor([[0.99998, 0.99999, 0.999985, 0.999992]])
    found = torch.nextafter(expected, torch.ones(1))
    rounded = expected.unsqueeze(0)
    assert gap_of(found, expected, shown) is not None
    assert gap_of(found, expected, shown, lambda: rounded) is None
    moved = expected - 1e-5
    assert gap_of(moved, expected, shown, lambda: rounded) is not None


@pytest.mark.parametrize(("share", "is_accepted"), [(0.5e-3, True), (2e-3, False)])
def test_scores_may_move_by_a_thousandth_of_their_spread(share: float, is_accepted: bool) -> None:
    expected = torch.linspace(-1, 1, 64).reshape(4, 16)
    found = expected.clone()
    found[2, 5] += share * expected[2].std()
    gap = gap_of(found, expected, signature("logit"), lambda: expected.unsqueeze(0))
    assert (gap is None) == is_accepted


def test_nan_scores_never_agree() -> None:
    shown = signature("logit")
    expected = torch.randn(2, 16)
    found = expected.clone()
    found[0, 3] = torch.nan
    assert gap_of(found, expected, shown, lambda: expected.unsqueeze(0)) is not None
