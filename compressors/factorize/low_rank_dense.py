"""Low-rank dense layers: fewer weights and fewer multiplications on every target.

A Linear from ``in`` to ``out`` features becomes one from ``in`` to ``rank`` and one from ``rank``
to ``out``. With calibration rows, the low-rank matrix is the one whose outputs are closest to the
original outputs on those rows.

Sources: Chen et al. 2021 (DRONE), https://proceedings.neurips.cc/paper/2021/hash/f56de5ef149cf0aedcc8f4797031e229-Abstract.html,
and Wang et al. 2024 (SVD-LLM), https://arxiv.org/abs/2403.07378 (truncation after whitening by the
Cholesky factor of the inputs' second moment).
Differs: the same optimum is computed as the projection on the principal directions of the outputs.
This needs no Cholesky factor and no inverse, so the second moment may be singular. If the layer has
a bias, the mean input is subtracted before moments are computed, and the bias is changed so that
the output for the mean input is exact.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.factored import FactoredLinear, describe_factored_layout
from compressors.core.modules.formats import layout_bytes
from compressors.core.placeholders import placeholder
from compressors.core.steps.composition_steps import share_or_number
from compressors.core.steps.decisions import (
    AppliedStep,
    Decision,
    StepPlan,
    choose_dense,
    selected_units,
)
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, swap
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.quantize.calibration.layer_inputs import (
    BATCH,
    input_vectors,
    read_layer_inputs,
)

REGULARIZATION = 1e-4
"""Added to the diagonal of the inputs' second moment, as a share of the diagonal's mean."""


def principal_outputs(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the principal directions of a layer's outputs, in descending order of energy.

    The energy of a direction is the mean square of the outputs projected on it.

    Args:
        weight: float, ``(out, in)``.
        moment: second moment or covariance of its inputs, ``(in, in)``.

    Returns:
        ``energy`` float64 ``(out,)``, descending, and ``directions`` float64 ``(out, out)``,
        orthonormal, one per column.
    """
    exact = weight.double()
    energy, directions = torch.linalg.eigh(exact @ moment.double() @ exact.T)  # ascending
    energy, directions = energy.flip(0).clamp(min=0), directions.flip(1)
    # The sign of an eigenvector is arbitrary: fix it, so that results are reproducible.
    largest = directions.abs().argmax(dim=0, keepdim=True)
    return energy, directions * torch.gather(directions, 0, largest).sign()


def factorize(weight: Tensor, directions: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute two factors whose product approximates a weight.

    The product ``expand @ reduce`` is the weight projected on the first ``rank`` directions of the
    outputs. Of all matrices of that rank, it has the smallest squared error of the outputs.

    Args:
        weight: float, ``(out, in)``.
        directions: the directions that ``principal_outputs`` returns.
        rank: number of directions to keep.

    Returns:
        ``reduce`` float32 ``(rank, in)`` and ``expand`` float32 ``(out, rank)``.
    """
    selected = directions[:, :rank]
    return (selected.T @ weight.double()).float(), selected.float()


def rank_within(energy: Tensor, most_error: float) -> int:
    """Find the smallest rank that loses at most a given share of the outputs' energy.

    Args:
        energy: energy of each direction, descending, ``(out,)``.
        most_error: the share of the energy that may be lost.
    """
    total = float(energy.sum())
    if total == 0:
        return 1
    lost_share = 1 - energy.cumsum(0) / total  # (out,): share lost with 1, 2, ... directions
    # 1e-12 is for rounding: the lost share is not exactly zero if no energy is lost.
    sufficient = (lost_share <= most_error + 1e-12).nonzero()
    return int(sufficient[0]) + 1


class _Moments:
    """Mean and second moment of a layer's inputs, accumulated over its calls."""

    def __init__(self, inputs: int) -> None:
        self.count = 0
        self.total = torch.zeros(inputs, dtype=torch.float64)
        self.products = torch.zeros((inputs, inputs), dtype=torch.float64)

    def __call__(self, x: Tensor) -> None:
        """Add inputs, ``(vectors, in)``."""
        exact = x.double()
        self.count += len(exact)
        self.total += exact.sum(dim=0)
        self.products += exact.T @ exact

    def moment(self, *, centered: bool) -> tuple[Tensor, Tensor]:
        """Return the second moment ``(in, in)``, and the subtracted mean ``(in,)`` or zeros."""
        mean = self.total / self.count if centered else torch.zeros_like(self.total)
        moment = self.products / self.count - torch.outer(mean, mean)
        variance = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        identity = torch.eye(len(mean), dtype=torch.float64)
        return moment + REGULARIZATION * variance * identity, mean


class LowRankDense(StepSettings):
    """Replace each dense layer by two smaller ones."""

    effect: ClassVar[Effect] = "parts"  # a unit is replaced by smaller units

    kind: Literal["low_rank_dense"] = "low_rank_dense"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to factorize: module names, with * for any characters."
    )
    rank: float = Field(
        0.25,
        gt=0,
        description="Rank of the factors. Below 1: as a share of the smaller side of the layer. "
        "From 1 on: a number. Not used with most_error.",
    )
    most_error: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Search the rank of each layer: the smallest whose outputs lose no more than "
        "this share of their squared norm (without their mean, if the layer has a bias). Empty: "
        "rank decides.",
    )
    weighted: bool = Field(
        True,
        description="Minimize the error of the outputs on calibration rows. False: minimize the "
        "error of the weights (plain singular value decomposition).",
    )
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows to read.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows, if the statistics of the inputs are used."""
        return ("calibration",) if self.weighted else ()

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the layers to factorize and their ranks; give a reason for each other layer."""
        units = Unit.of(model.module)
        decisions = choose_dense(units, self.layers, self.kind)
        for unit in selected_units(units, decisions):
            outputs, inputs = unit.weight.shape
            largest = _compute_largest_rank(inputs, outputs)
            if self.most_error is not None:
                decisions[unit.name] = self._search_decision(unit, largest, self.most_error)
                continue
            rank = share_or_number(self.rank, min(inputs, outputs))
            before, after = inputs * outputs, rank * (inputs + outputs)
            if rank > largest:
                reason = Reason("rank_not_smaller", rank=rank, before=before, after=after)
                decisions[unit.name] = Decision("skipped", (reason,))
            else:
                reason = Reason(
                    "factorized", step=self.kind, inputs=inputs, rank=rank, outputs=outputs
                )
                decisions[unit.name] = Decision("taken", (reason,))
        return StepPlan(decisions, payload=None)  # ``apply`` needs only the decisions

    def _search_decision(self, unit: Unit, largest: int, most_error: float) -> Decision:
        """Return the decision for a layer whose rank is searched up to ``largest``."""
        outputs, inputs = unit.weight.shape
        if largest == 0:
            reason = Reason("no_smaller_rank", inputs=inputs, outputs=outputs)
            return Decision("skipped", (reason,))
        reason = Reason("rank_searched", step=self.kind, most_error=most_error, rank=largest)
        rank_1_bytes = layout_bytes(
            describe_factored_layout(inputs, outputs, rank=1, bias=unit.bias is not None)
        )
        # ``apply`` decides; the plan has the smallest and the largest possible number of bytes.
        return Decision("deferred", (reason,), (rank_1_bytes, unit.bytes))

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Replace every selected layer by its factors.

        Raises:
            RowsMissing: ``weighted`` is set, and there are no calibration rows.
            StepRefused: a layer never ran on the calibration rows.
        """
        module, outcomes = model.module, dict[str, Decision]()
        units = plan.units(module)
        moments = self._compute_moments(model, bench, units)
        for unit in units:
            outputs, inputs = unit.weight.shape
            weight, bias = unit.weight, unit.bias
            moment, mean = torch.eye(inputs, dtype=torch.float64), torch.zeros(inputs).double()
            if self.weighted:
                moment, mean = moments[unit.name].moment(centered=bias is not None)
            energy, directions = principal_outputs(weight, moment)
            rank = share_or_number(self.rank, min(inputs, outputs))
            if self.most_error is not None:
                rank = rank_within(energy, self.most_error)
            if rank > _compute_largest_rank(inputs, outputs):
                too_large = Reason("found_rank_not_smaller", rank=rank)
                outcomes[unit.name] = Decision("skipped", (too_large,))
                continue
            reduce, expand = factorize(weight, directions, rank)
            stored = {"reduce.weight": reduce.contiguous(), "expand.weight": expand.contiguous()}
            if bias is not None:
                correction = (weight.double() - expand.double() @ reduce.double()) @ mean
                stored["expand.bias"] = (bias.double() + correction).float()
            lost_share = float(energy[rank:].sum() / energy.sum().clamp(min=1e-300))
            rank_loss = Reason("rank_loss", rank=rank, share=lost_share)
            outcomes[unit.name] = Decision("taken", (rank_loss,))
            layer = FactoredLinear(inputs, outputs, rank, bias=bias is not None, stored=stored)
            swap(module, unit.name, layer.eval())
        return AppliedStep(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace selected layers by placeholder factors; a searched rank is the largest one."""
        for unit in plan.units(model.module):
            outputs, inputs = unit.weight.shape
            rank = share_or_number(self.rank, min(inputs, outputs))
            if self.most_error is not None:
                rank = _compute_largest_rank(inputs, outputs)
            bias = unit.bias is not None
            layout = describe_factored_layout(inputs, outputs, rank, bias=bias)
            stored = {name: placeholder(spec) for name, spec in layout.items()}
            layer = FactoredLinear(inputs, outputs, rank, bias=bias, stored=stored)
            swap(model.module, unit.name, layer.eval())
        return model

    def _compute_moments(
        self, model: Model, bench: Bench, units: list[Unit]
    ) -> Mapping[str, _Moments]:
        """Return the moments of the selected layers' inputs; nothing if not ``weighted``."""
        if not self.weighted:
            return {}
        if bench.calibration is None:
            raise RowsMissing("weighted_needs_rows", step=self.kind)
        moments = {unit.name: _Moments(unit.weight.shape[1]) for unit in units}
        read_layer_inputs(
            model.module,
            units,
            bench.calibration,
            bench.signature,
            batch=BATCH,
            limit=self.rows,
            receive=lambda unit, x: moments[unit.name](input_vectors(x)),
        )
        for name, accumulated in moments.items():
            if not accumulated.count:
                raise StepRefused("layer_not_called", layer=name)
        return moments


def _compute_largest_rank(inputs: int, outputs: int) -> int:
    """Return the largest rank with fewer weights than the original layer; 0 if there is none."""
    return math.ceil(inputs * outputs / (inputs + outputs)) - 1
