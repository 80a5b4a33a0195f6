"""Estimates, judged limits and the verdict of a target."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from compressors.contracts.frozen import Frozen
from compressors.contracts.limits import Limit
from compressors.contracts.reasoned import Reasoned

Outcome = Literal["accepted", "rejected", "undecided", "built-unmeasured"]
"""The result of the gate for a target, or for an order (a request to compress a model).

The gate compares the limits of the order with measurements of the compressed model.

``accepted``: all limits hold. ``rejected``: a limit is violated, or the target was not built.
``undecided``: the interval of a number contains its limit. ``built-unmeasured``: the target was
built and its weights have the planned formats, but it cannot run on this machine.
"""


class Estimate(Frozen):
    """A measured number with its 95 % confidence interval ``[low, high]``.

    Exact numbers, such as bytes, have ``low == point == high``.
    """

    point: float
    low: float
    high: float
    rows: int | None = Field(None, description="How many rows it was estimated from.")
    groups: int | None = Field(
        None, description="How many groups, such as users, it was estimated from, if rows have one."
    )
    unresolved: str | None = Field(
        None, description="Why there is no interval; then it is the whole range of the metric."
    )


class Judgement(Reasoned):
    """The outcome of one limit, with the measured number.

    For an undecided limit, ``rows_to_decide`` and ``groups_to_decide`` estimate how many test rows
    and groups (such as users) are needed to decide it.
    """

    limit: Limit
    measured: Estimate | None
    outcome: Literal["accepted", "rejected", "undecided"]
    rows_to_decide: int | None = None
    groups_to_decide: int | None = None


class Verdict(Reasoned):
    """The outcome of one target, with the outcome of each of its limits."""

    target: str
    outcome: Outcome
    judgements: tuple[Judgement, ...] = ()


def overall(verdicts: Iterable[Verdict]) -> Outcome:
    """Return the outcome of an order: the worst outcome of its measured targets.

    From worst to best, the outcomes are ``rejected``, ``undecided`` and ``accepted``. Targets that
    are ``built-unmeasured`` are ignored. If no target is measured, the order is
    ``built-unmeasured``.
    """
    outcomes = {verdict.outcome for verdict in verdicts}
    worst_first: tuple[Outcome, ...] = ("rejected", "undecided", "accepted")
    return next((outcome for outcome in worst_first if outcome in outcomes), "built-unmeasured")
