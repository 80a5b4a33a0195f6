"""Check whether a stored report allows its version to become champion. No Prefect.

Another program may have written the report. Therefore its outcome is recomputed from the targets'
verdicts, and each verdict from the judgements of its limits. A judgement is the outcome of one
limit, ``accepted``, ``rejected`` or ``undecided``, with the number that was measured.
"""

from compressors.contracts import overall
from compressors.metrics import judge
from infra.errors import PromotionRefused
from tasks.orchestration.documents import Report, TargetReport


def require_accepted(model: str, version: str, report: Report) -> None:
    """Raise unless a report is accepted: a target was measured, and every measured one accepted.

    Args:
        model: registered name, for the error.
        version: version number, for the error.
        report: the report.

    Raises:
        PromotionRefused: the report has no targets or no limits, contradicts itself, or its
            outcome is not ``accepted``.
    """
    if not report.limits:
        raise PromotionRefused("limits_missing", model=model, version=version)
    for target in report.targets:
        if problem := _describe_contradiction(report, target):
            raise PromotionRefused(
                "verdict_contradicts_judgements", model=model, version=version, problem=problem
            )
    outcome = overall(target.verdict for target in report.targets)
    if outcome != report.outcome:
        raise PromotionRefused(
            "outcome_contradicts_verdicts",
            model=model,
            version=version,
            stated=report.outcome,
            computed=outcome,
        )
    if outcome != "accepted":
        reasons = "; ".join(target.verdict.reason for target in report.targets)
        raise PromotionRefused(
            "not_accepted", model=model, version=version, outcome=outcome, reasons=reasons
        )


def _describe_contradiction(report: Report, target: TargetReport) -> str | None:
    """Describe how a target's verdict contradicts its judgements; None if it does not."""
    verdict = target.verdict
    if verdict.target != target.target:
        return f"the verdict of {target.target} is for {verdict.target}"
    if not verdict.judgements:
        if verdict.outcome == "accepted":
            return f"{target.target} is accepted, but was judged by no limit"
        return None  # nothing was measured
    judged = {str(item.limit) for item in verdict.judgements}
    missing = [str(limit) for limit in report.limits if str(limit) not in judged]
    if missing:
        return f"{target.target} was not judged by its limit {missing[0]}"
    outcome = judge.recompute_outcome(verdict)
    if outcome != verdict.outcome:
        return (
            f"the verdict of {target.target} is {verdict.outcome}, but its judgements add up to "
            f"{outcome} ({'; '.join(item.reason for item in verdict.judgements)})"
        )
    return None
