"""Whether a stored report allows its version to become champion. No Prefect.

A report is read from the store, where another program may have written it: what it says about its
own outcome is computed again from its targets' verdicts, and these from their judgements.
"""

from compressors import judge
from compressors.contracts import overall
from infra.errors import PromotionRefused
from tasks.documents import Report, TargetReport


def require_accepted(model: str, version: str, report: Report) -> None:
    """Raise unless every measured target of a report was accepted.

    Raises:
        PromotionRefused: the report has no targets or no limits, contradicts itself, or its
            outcome is not ``accepted``.
    """
    which = f"{model} version {version}"
    if not report.limits:
        raise PromotionRefused(
            f"The report of {which} has no limits, so nothing was promised. Compress the model "
            "again with at least one limit."
        )
    for target in report.targets:
        if problem := _contradiction(report, target):
            raise PromotionRefused(
                f"The report of {which} contradicts itself: {problem}. It was changed after it "
                "was judged. Compress the model again."
            )
    outcome = overall(target.verdict for target in report.targets)
    if outcome != report.outcome:
        raise PromotionRefused(
            f"The report of {which} contradicts itself: it says {report.outcome}, and its "
            f"targets' verdicts add up to {outcome}. It was changed after it was judged. Compress "
            "the model again."
        )
    if outcome != "accepted":
        reasons = "; ".join(target.verdict.reason for target in report.targets)
        raise PromotionRefused(
            f"{which} is {outcome} ({reasons}). Only an accepted version can become champion."
        )


def _contradiction(report: Report, target: TargetReport) -> str | None:
    verdict = target.verdict
    if verdict.target != target.target:
        return f"the verdict of {target.target} is one of {verdict.target}"
    if not verdict.judgements:
        return None  # nothing was measured
    judged = {str(item.limit) for item in verdict.judgements}
    missing = [str(limit) for limit in report.limits if str(limit) not in judged]
    if missing:
        return f"{target.target} was not judged by its limit {missing[0]}"
    outcome = judge.recomputed(verdict)
    if outcome != verdict.outcome:
        return (
            f"{target.target} says {verdict.outcome}, and its judgements add up to {outcome} "
            f"({'; '.join(item.reason for item in verdict.judgements)})"
        )
    return None
