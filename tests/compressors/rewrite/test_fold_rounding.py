"""The check of ``fold``: scores may change by float32 rounding, and not by more.

The check compares the scores of synthetic rows before and after folding. A difference is accepted
if it is a small share of the scores' spread (their standard deviation over the rows), or if
rounding every float32 number of the network differently changes the scores by as much.

Dense inputs of synthetic rows are near 0, but the batch norms of the networks here have the
statistics of inputs near 1e5. The scores of the synthetic rows hardly differ from each other, so
float32 rounding is a large share of their spread.
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
"""Mean and standard deviation of the dense inputs, as of raw times or prices."""


class NormedTower(nn.Module):
    """Maps ids and dense inputs to vectors of length 1, with two batch norms."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, DIM)
        self.first, self.first_norm = nn.Linear(DIM + DENSE, 32), nn.BatchNorm1d(32)
        self.second, self.second_norm = nn.Linear(32, 32), nn.BatchNorm1d(32)
        self.last = nn.Linear(32, DIM)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(torch.cat([self.table(ids), dense], dim=1))))
        return F.normalize(self.last(torch.relu(self.second_norm(self.second(x)))), dim=1)


class NormedTowers(nn.Module):
    """Divides the cosine similarity of two towers by a temperature of 0.05."""

    def __init__(self, output: str = "logit") -> None:
        super().__init__()
        self.query, self.item = NormedTower(USERS), NormedTower(ITEMS)
        self.output = output  # "logit" or "probability"

    def forward(
        self, user: Tensor, item: Tensor, user_features: Tensor, item_features: Tensor
    ) -> Tensor:
        score = (self.query(user, user_features) * self.item(item, item_features)).sum(dim=1) / 0.05
        return torch.sigmoid(score) if self.output == "probability" else score


def signature(output: str) -> Signature:
    return Signature(
        inputs=(
            IdInput(name="user", table="query.table"),
            IdInput(name="item", table="item.table"),
            DenseInput(name="user_features", shape=(DENSE,)),
            DenseInput(name="item_features", shape=(DENSE,)),
        ),
        outputs=(Output(name="label", kind="ctr", form=output, label="label", metric="auc"),),
    )


def random_rows(count: int, seed: int) -> dict[str, Tensor]:
    """Return inputs whose dense values have the mean ``MEAN`` and the deviation ``DEVIATION``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(USERS, (count,), generator=generator),
        "item": torch.randint(ITEMS, (count,), generator=generator),
        "user_features": MEAN + DEVIATION * torch.randn(count, DENSE, generator=generator),
        "item_features": MEAN + DEVIATION * torch.randn(count, DENSE, generator=generator),
    }


def towers_with_norm_statistics(output: str) -> Model:
    """Build a network of random weights whose norms have the statistics of ``random_rows``."""
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
        # Three of the six combinations run in every test run: each format once.
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
    bench, source = Bench(signature=signature(output)), towers_with_norm_statistics(output)
    if format_step is not None:  # as in a preset that compresses tables before it folds norms
        source = run(format_step, source, bench, tmp_path / "packed")
    folded = run(Fold(), source, bench, tmp_path / "folded")
    norms = [m for m in folded.module.modules() if isinstance(m, nn.BatchNorm1d | FoldedNorm)]
    assert [type(norm) for norm in norms] == [FoldedNorm] * 4
    inputs = random_rows(500, seed=1000)  # near 1e5, as the statistics of the norms
    with torch.no_grad():  # ``private`` returns a copy in evaluation mode
        difference = folded.module(**inputs) - source.private().module(**inputs)
    # Terms near 1e5 cancel to sums of about 1e2, which keep 4 of float32's 7 digits. The cosine is
    # then divided by the temperature of 0.05.
    assert float(difference.abs().max()) < 0.02


def test_a_fold_with_wrong_factors_is_refused_if_float32_rounding_exceeds_the_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the 32 factors of each norm is 1 % off, far more than rounding."""
    from compressors.rewrite import fold

    original = fold.scale_outputs
    factor = torch.ones(32, dtype=torch.float64)
    factor[0] = 1.01

    def wrong_scaled_outputs(
        weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        return original(weight, bias, scale * factor, shift)

    monkeypatch.setattr(fold, "scale_outputs", wrong_scaled_outputs)
    with raises_code(StepRefused, "folded_scores_differ"):
        run(
            Fold(),
            towers_with_norm_statistics("logit"),
            Bench(signature=signature("logit")),
            tmp_path / "out",
        )


def test_a_probability_near_one_may_change_by_one_float32_step() -> None:
    """One float32 step at 0.99999 changes the logit by 0.006, more than the tolerance.

    It is accepted only if scores with different rounding are given, here equal to ``expected``.
    """
    output_signature = signature("probability")
    expected = torch.tensor([[0.99998, 0.99999, 0.999985, 0.999992]])
    scores = torch.nextafter(expected, torch.ones(1))
    # (draws of the rounding, scales of the synthetic inputs, rows)
    rounded = expected.unsqueeze(0)

    def difference(changed_scores: Tensor) -> str | None:
        return describe_score_difference(
            changed_scores, expected, output_signature, rounded=lambda: rounded
        )

    assert describe_score_difference(scores, expected, output_signature) is not None
    assert difference(scores) is None
    assert difference(expected - 1e-5) is not None


@pytest.mark.parametrize(("share", "is_accepted"), [(0.5e-3, True), (2e-3, False)])
def test_scores_may_change_by_a_thousandth_of_their_spread(share: float, is_accepted: bool) -> None:
    """The scores with different rounding equal ``expected``, so rounding allows no more."""
    expected = torch.linspace(-1, 1, 64).reshape(4, 16)
    scores = expected.clone()
    scores[2, 5] += share * expected[2].std()
    difference = describe_score_difference(
        scores, expected, signature("logit"), rounded=lambda: expected.unsqueeze(0)
    )
    assert (difference is None) == is_accepted


def test_nan_scores_are_never_within_the_tolerance() -> None:
    output_signature = signature("logit")
    expected = torch.randn(2, 16)
    scores = expected.clone()
    scores[0, 3] = torch.nan
    difference = describe_score_difference(
        scores, expected, output_signature, rounded=lambda: expected.unsqueeze(0)
    )
    assert difference is not None
