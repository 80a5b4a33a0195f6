"""The check of ``fold``: scores may change by float32 rounding, and not by more.

Random example rows are near 0, but the networks here were trained on values near 1e5. On the
example rows their scores hardly differ, so float32 rounding is a large share of their spread.
"""

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
from compressors.prune.structure.narrowing import describe_score_difference
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.rewrite.fold import Fold

USERS, ITEMS, DIM, DENSE = 60, 40, 8, 3
MEAN, DEVIATION = 1e5, 100.0
"""Mean and deviation of the dense inputs in training, as of raw times or prices."""


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
    """Cosine similarity of two towers over a temperature; batch norms rescale the raw inputs."""

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


def random_rows(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(USERS, (count,), generator=generator),
        "item": torch.randint(ITEMS, (count,), generator=generator),
        "seen": MEAN + DEVIATION * torch.randn(count, DENSE, generator=generator),
        "price": MEAN + DEVIATION * torch.randn(count, DENSE, generator=generator),
    }


def trained_towers(output: str) -> Model:
    """A network whose batch norms have the statistics of ``random_rows``."""
    torch.manual_seed(0)
    module = NormedTowers(output).train()
    with torch.no_grad():
        for batch in range(60):
            module(**random_rows(256, batch))
    module.eval().requires_grad_(False)
    architecture = Architecture(path="tests:NormedTowers", config={"output": output})
    return Model(module, NormedTowers, Network(architecture=architecture))


@pytest.mark.parametrize(
    ("output", "format_step"),
    [
        # In the default tier each output and each format occurs once.
        pytest.param(
            output,
            format_step,
            id=f"{output}-{format_step.kind if format_step else 'float32'}",
            marks=() if (format_index + output_index) % 2 else pytest.mark.nightly,
        )
        for output_index, output in enumerate(("logit", "probability"))
        for format_index, format_step in enumerate((None, RowwiseInt8(), RowwiseInt4()))
    ],
)
def test_fold_is_accepted_if_float32_rounding_exceeds_the_tolerance_of_a_small_spread(
    output: str, format_step: RowwiseInt8 | RowwiseInt4 | None, tmp_path: Path
) -> None:
    bench, source = Bench(signature=signature(output)), trained_towers(output)
    if format_step is not None:  # a preset compresses tables first
        source = run(format_step, source, bench, tmp_path / "packed")
    folded = run(Fold(), source, bench, tmp_path / "folded")
    norms = [m for m in folded.module.modules() if isinstance(m, nn.BatchNorm1d | FoldedNorm)]
    assert [type(norm) for norm in norms] == [FoldedNorm] * 4
    inputs = random_rows(500, seed=1000)  # distributed as in training
    with torch.no_grad():
        difference = folded.module(**inputs) - source.private().module(**inputs)
    # Sums of numbers near 1e5 that cancel to about 1e2 keep 4 of float32's 7 digits. The cosine is
    # then divided by the temperature of 0.05.
    assert float(difference.abs().max()) < 0.02


def test_a_fold_with_wrong_factors_is_refused_if_float32_rounding_exceeds_the_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the 32 factors of each norm is 1 % off, far more than rounding."""
    from compressors.rewrite import fold

    original = fold.scaled_outputs
    factor = torch.ones(32, dtype=torch.float64)
    factor[0] = 1.01

    def wrong_scaled_outputs(
        weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        return original(weight, bias, scale * factor, shift)

    monkeypatch.setattr(fold, "scaled_outputs", wrong_scaled_outputs)
    with raises_code(StepRefused, "folded_scores_differ"):
        run(Fold(), trained_towers("logit"), Bench(signature=signature("logit")), tmp_path / "out")


def test_a_probability_near_one_may_change_by_one_float32_step() -> None:
    """In logits, one step of float32 at 0.99999 is 0.6 % of 1: more than the tolerance."""
    output_signature = signature("probability")
    expected = torch.tensor([[0.99998, 0.99999, 0.999985, 0.999992]])
    scores = torch.nextafter(expected, torch.ones(1))
    rounded = expected.unsqueeze(0)
    assert describe_score_difference(scores, expected, output_signature) is not None
    assert describe_score_difference(scores, expected, output_signature, lambda: rounded) is None
    changed_scores = expected - 1e-5
    assert (
        describe_score_difference(changed_scores, expected, output_signature, lambda: rounded)
        is not None
    )


@pytest.mark.parametrize(("share", "is_accepted"), [(0.5e-3, True), (2e-3, False)])
def test_scores_may_change_by_a_thousandth_of_their_spread(share: float, is_accepted: bool) -> None:
    expected = torch.linspace(-1, 1, 64).reshape(4, 16)
    scores = expected.clone()
    scores[2, 5] += share * expected[2].std()
    difference = describe_score_difference(
        scores, expected, signature("logit"), lambda: expected.unsqueeze(0)
    )
    assert (difference is None) == is_accepted


def test_nan_scores_are_never_within_the_tolerance() -> None:
    output_signature = signature("logit")
    expected = torch.randn(2, 16)
    scores = expected.clone()
    scores[0, 3] = torch.nan
    assert (
        describe_score_difference(scores, expected, output_signature, lambda: expected.unsqueeze(0))
        is not None
    )
