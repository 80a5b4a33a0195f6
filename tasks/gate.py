"""Judge measurements against limits: one verdict per target."""

from prefect import task

from compressors.contracts import Artifact, Limit, Verdict
from compressors.metrics import judge
from tasks.orchestration.documents import measurement_of
from tasks.orchestration.policy import KEPT


@task(task_run_name="gate {target}", **KEPT)
def gate(
    target: str,
    limits: tuple[Limit, ...],
    measurement: Artifact | None,
) -> Verdict:
    """Judge one built target.

    Args:
        target: name of the target.
        limits: the order's limits.
        measurement: its stored numbers; None if it cannot run on this machine.

    Raises:
        CompressionError: no limits, or a limit on a number that was not measured.
    """
    numbers = None if measurement is None else measurement_of(measurement).numbers
    return judge.verdict(target, limits, numbers, built=True)
