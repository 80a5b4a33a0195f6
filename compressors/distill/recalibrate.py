"""Recalibrate the probabilities of a compressed model; use it as the last step of a recipe.

Pruning, quantization and soft labels shift scores, which increases log loss. An increasing map of
the logit, fitted on validation rows, corrects this and keeps the order of rows. The methods are:

- ``temperature``: one factor (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
- ``platt``: a factor and an offset (Platt 1999).
- ``isotonic``: a piecewise linear map (Zadrozny and Elkan 2002). Rows are sorted by score and
  divided into bins of about equal size. The map passes through a point for each bin: its mean
  logit and the logit of its click rate, made increasing by pooling neighbouring bins.
  Differs: no piece has slope zero, so the map creates no ties; the first and last piece continue
  beyond the outer points.
- ``best``: the method with the smallest cross-validated log loss (five folds), or no map if that
  has a smaller loss.

A *click* is a row with label 1; the *click rate* is the share of such rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.contracts.task_kind import OutputForm
from compressors.core.batches import batches
from compressors.core.model import Model
from compressors.core.modules.output_calibration import (
    OutputMaps,
    Recalibration,
    attach,
    list_recalibrations,
    to_logit,
)
from compressors.core.plan_lines import output_line_name
from compressors.core.scores import network_scores, score_columns
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.errors.compression import CompressionError, NothingToCompress
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.metrics.point_estimates import logloss

Floats = NDArray[np.float64]
Method = Literal["temperature", "platt", "isotonic"]
METHODS: tuple[Method, ...] = ("temperature", "platt", "isotonic")
FOLDS = 5
"""Folds of the cross-validation."""

LEAST_SLOPE = 1e-2
"""Smallest slope of an isotonic piece (logit per logit), so that unequal scores stay unequal."""

SCORING_ROWS = 8192
"""Rows per batch."""

NEWTON_STEPS = 50
"""Largest number of iterations of Newton's method."""


def fit_line(logit: Floats, label: Floats, *, offset: bool) -> tuple[float, float]:
    """Fit a factor (slope) and an offset of the logit by maximum likelihood.

    The solver is Newton's method. Labels are smoothed as if there were one more click and one more
    row without a click (Platt 1999), so that the slope is finite if a threshold separates the
    classes.

    Args:
        logit: float64 ``(rows,)``.
        label: 0 or 1, ``(rows,)``.
        offset: if False, the offset is 0.

    Returns:
        Slope and offset. The slope is positive, because a map must not reverse the order.

    Raises:
        StepRefused: the best slope is not positive.
    """
    clicks = label.sum()
    label = np.where(label > 0.5, (clicks + 1) / (clicks + 2), 1 / (len(label) - clicks + 2))
    columns = np.stack([logit, np.ones_like(logit)], axis=1)[:, : 2 if offset else 1]
    coefficients = np.array([1.0, 0.0])[: columns.shape[1]]
    best = _compute_cross_entropy(columns @ coefficients, label)
    for _ in range(NEWTON_STEPS):
        probability = _sigmoid(columns @ coefficients)
        gradient = columns.T @ (probability - label) / len(label)
        hessian = (columns * (probability * (1 - probability))[:, None]).T @ columns / len(label)
        # The small diagonal keeps the matrix invertible if all logits are equal.
        newton_step = np.linalg.solve(hessian + 1e-12 * np.eye(len(coefficients)), gradient)
        step_size = 1.0  # halved until the cost does not increase
        while (
            _compute_cross_entropy(columns @ (coefficients - step_size * newton_step), label) > best
            and step_size > 1e-6
        ):
            step_size /= 2
        candidate = coefficients - step_size * newton_step
        cost = _compute_cross_entropy(columns @ candidate, label)
        if cost >= best - 1e-15:  # no further decrease, except by rounding
            break
        coefficients, best = candidate, cost
    if not (np.isfinite(coefficients).all() and coefficients[0] > 0):
        raise (
            StepRefused("slope_not_positive", slope=float(coefficients[0]))
            if offset
            else StepRefused("slope_not_positive_without_offset", slope=float(coefficients[0]))
        )
    return float(coefficients[0]), float(coefficients[1]) if offset else 0.0


def fit_pieces(logit: Floats, label: Floats, knots: int) -> tuple[Floats, Floats]:
    """Fit the isotonic map as a piecewise linear function.

    Args:
        logit: float64 ``(rows,)``.
        label: 0 or 1, ``(rows,)``.
        knots: largest number of bins of rows, and so of points that the map passes through.

    Returns:
        Logits ``(n,)`` and their mapped values ``(n,)``, both strictly increasing, ``n >= 2``.

    Raises:
        StepRefused: the rows have fewer than two different scores.
    """
    from scipy.optimize import isotonic_regression  # importing it takes 0.2 s

    permutation = np.argsort(logit, kind="stable")
    ends = np.arange(1, knots) * len(permutation) // knots
    # Rows with equal scores stay in one bin. Every bin has at least half of the average size.
    starts, min_rows = [0], max(len(permutation) // knots // 2, 1)
    for end in np.searchsorted(logit[permutation], logit[permutation][ends], side="left"):
        if min_rows <= end - starts[-1] and min_rows <= len(permutation) - end:
            starts.append(int(end))
    bins = np.split(permutation, starts[1:])
    means = np.array([logit[rows_of_bin].mean() for rows_of_bin in bins])
    clicks = np.array([label[rows_of_bin].sum() for rows_of_bin in bins])
    rows = np.array([len(rows_of_bin) for rows_of_bin in bins], dtype=np.float64)
    # Half a click and half a row without a click are added, so no bin has probability 0 or 1.
    click_rate = isotonic_regression((clicks + 0.5) / (rows + 1), weights=rows).x
    mapped = np.log(click_rate / (1 - click_rate))
    # Bins whose mean logits are almost equal would make the slope between them very large.
    rising = np.concatenate([[True], np.diff(means) > 1e-9])
    means, mapped = means[rising], mapped[rising]
    if len(means) < 2:
        raise StepRefused("scores_equal")
    for index in range(1, len(means)):
        min_mapped = mapped[index - 1] + LEAST_SLOPE * (means[index] - means[index - 1])
        mapped[index] = max(mapped[index], min_mapped)
    return means, mapped


def fit_map(
    method: Method,
    output: str,
    logit: Floats,
    label: Floats,
    knots: int,
    name: str | None = None,
) -> Recalibration:
    """Fit the map of one method.

    ``output`` is the form of the model's output, and ``name`` its name, if the model has several.
    The other arguments are those of ``fit_pieces``.

    Raises:
        StepRefused: no increasing map fits the rows.
    """
    if method != "isotonic":
        slope, offset = fit_line(logit, label, offset=method == "platt")
        return Recalibration(method, output, name=name, line=torch.tensor([slope, offset]))
    means, mapped = fit_pieces(logit, label, knots)
    slopes = np.diff(mapped) / np.diff(means)
    # Beyond the outer points there are no data, so the slope there is at most 1.
    first_slope, last_slope = min(slopes[0], 1.0), min(slopes[-1], 1.0)
    line = torch.tensor(
        [first_slope, mapped[0] - first_slope * means[0]]
    )  # slope and offset of the first piece
    bends = torch.tensor(
        np.stack([means, np.append(slopes, last_slope)])
    )  # where the further pieces begin, and their slopes
    return Recalibration(method, output, name=name, knots=len(means), line=line, bends=bends)


def cross_validated_loss(method: Method, logit: Floats, label: Floats, knots: int) -> float:
    """Return the cross-validated log loss of a method; infinite if a fit fails."""
    fold = np.arange(len(logit)) % FOLDS
    mapped = np.empty(len(logit))
    for number in range(FOLDS):
        try:
            fitted = fit_map(method, "logit", logit[fold != number], label[fold != number], knots)
        except CompressionError:
            return float("inf")
        inputs = torch.from_numpy(logit[fold == number]).float()
        mapped[fold == number] = fitted(inputs).double().numpy()
    return logloss(label, _sigmoid(mapped))


@dataclass(frozen=True)
class SelectedOutput:
    """An output that the step recalibrates.

    Attributes:
        index: its index among the outputs.
        name: its name; None if the model has only one output.
        form: whether it is a logit or a probability.
    """

    index: int
    name: str | None
    form: OutputForm


class Recalibrate(StepSettings):
    """Map the outputs of a CTR model so that its probabilities fit the validation rows."""

    effect: ClassVar[Effect] = "output"  # no unit changes; a map follows the network's output

    kind: Literal["recalibrate"] = "recalibrate"
    method: Literal["temperature", "platt", "isotonic", "best"] = Field(
        "platt",
        description="Map of the logit. temperature: one factor. platt: a factor and an offset. "
        "isotonic: an increasing piecewise linear map. best: the one with the smallest "
        "cross-validated log loss, or none.",
    )
    knots: int = Field(
        32, ge=2, le=1024, description="Largest number of points of the isotonic map."
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Validation rows, because the network was not trained on them."""
        return ("validation",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[tuple[SelectedOutput, ...]]:
        """Select the outputs that are probabilities; the step changes no table or dense layer.

        Raises:
            NothingToCompress: no output is a probability.
            StepRefused: the model already has a recalibration map.
        """
        signature = bench.signature
        selected = tuple(
            SelectedOutput(
                index, output.name if signature.has_several_outputs else None, output.form
            )
            for index, output in enumerate(signature.outputs)
            if output.task_kind.predicts_probability
        )
        if not selected:
            task = signature.outputs[0].kind
            raise NothingToCompress("probability_missing", step=self.kind, task=task)
        for existing_map in list_recalibrations(model.module):  # a second one is hard to interpret
            raise StepRefused("recalibrated_already", step=self.kind, method=existing_map.method)
        decision = Decision("taken", (Reason("selected", step=self.kind),))
        return StepPlan({output_line_name(output.name): decision for output in selected}, selected)

    def apply(
        self, model: Model, bench: Bench, plan: StepPlan[tuple[SelectedOutput, ...]]
    ) -> AppliedStep:
        """Fit a map of each selected output on the validation rows that have its label.

        Raises:
            RowsMissing: there are no validation rows.
            StepRefused: no increasing map fits the rows, or the model class has an attribute with
                the name under which the maps are attached.
        """
        if bench.validation is None:
            raise RowsMissing("validation_rows_missing", step=self.kind)
        signature = bench.signature
        parts = list(batches(bench.validation, signature, SCORING_ROWS))
        with torch.no_grad():
            scores = torch.cat(
                [network_scores(model.module, part.inputs, signature) for part in parts]
            )
        columns = score_columns(scores)
        labels = score_columns(torch.cat([part.label for part in parts]))
        maps: dict[int, Recalibration] = {}
        outcomes: dict[str, Decision] = {}
        for output in plan.payload:
            has_label = ~labels[output.index].isnan()
            label = labels[output.index][has_label].numpy().astype(np.float64)
            fitted, decision = self._fit(output, columns[output.index][has_label], label)
            outcomes[output_line_name(output.name)] = decision
            if fitted is not None:
                maps[output.index] = fitted
        _attach(model, maps)
        return AppliedStep(model, outcomes)

    def _fit(
        self, output: SelectedOutput, score: Tensor, label: Floats
    ) -> tuple[Recalibration | None, Decision]:
        """Fit the map of one output; None if no map is better.

        Args:
            output: the output.
            score: its values, float ``(rows,)``.
            label: 0 or 1, ``(rows,)``.

        Returns:
            The map, and the decision about the output.

        Raises:
            StepRefused: no increasing map fits the rows.
        """
        form = output.form
        logit = to_logit(score, form).double().numpy()
        before = logloss(label, _sigmoid(logit))
        selected_method: Method | None = None
        if self.method == "best":
            losses = {
                method: cross_validated_loss(method, logit, label, self.knots) for method in METHODS
            }
            best = min(losses, key=lambda method: losses[method])
            selected_method = best if losses[best] < before else None
        else:
            selected_method = self.method
        if selected_method is None:
            no_map = Reason("no_better_map", step=self.kind, loss=before)
            return None, Decision("skipped", (no_map,))
        fitted = fit_map(selected_method, form, logit, label, self.knots, output.name)
        with torch.no_grad():
            recalibrated = fitted(score)
        after = logloss(label, _sigmoid(to_logit(recalibrated, form).double().numpy()))
        mapped = Reason(
            "output_mapped", method=selected_method, before=before, after=after, rows=len(label)
        )
        return fitted, Decision("taken", (mapped,))

    def dry_run(self, model: Model, plan: StepPlan[tuple[SelectedOutput, ...]]) -> Model:
        """Attach maps without fitted values, with as many knots as the fitted maps can have."""
        knots = self.knots if self.method in ("isotonic", "best") else 0
        placeholders = {
            output.index: Recalibration(
                self.method,
                output.form,
                name=output.name,
                knots=knots,
                line=torch.tensor([1.0, 0.0]),
                bends=torch.zeros(2, knots),
            )
            for output in plan.payload
        }
        _attach(model, placeholders)
        return model


def _attach(model: Model, maps: Mapping[int, Recalibration]) -> None:
    """Attach the maps of some outputs, by the index of the output, in place."""
    if not maps:
        return
    only = maps.get(0)
    attach(model.module, only if only is not None and only.name is None else OutputMaps(maps))
    model.module.eval()


def _sigmoid(logit: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * logit))


def _compute_cross_entropy(logit: Floats, label: Floats) -> float:
    """Return the binary cross entropy, a mean over rows."""
    return float((np.logaddexp(0, logit) - label * logit).mean())
