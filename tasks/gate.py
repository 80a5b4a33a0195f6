"""Judge measurements against limits: one verdict per target."""

from prefect import task

from compressors.contracts import Artifact, Limit, Verdict
from compressors.metrics import judge
from tasks.orchestration.documents import read_measurement
from tasks.orchestration.task_calls import TASK_OPTIONS


@task(task_run_name="gate {target}", **TASK_OPTIONS)
def gate(
    target: str,
    limits: tuple[Limit, ...],
    measurement: Artifact | None,
) -> Verdict:
    """Compare the measurements of one target with the limits and return the verdict.

    Args:
        target: name of the target.
        limits: the order's limits.
        measurement: the stored measurements; None if the target cannot run on this machine.

    Raises:
        CompressionError: there are no limits, or a limit is on a number that was not measured.
    """
    numbers = None if measurement is None else read_measurement(measurement).numbers
    # Only targets that were built are judged; without numbers the verdict is "built-unmeasured".
    return judge.verdict(target, limits, numbers, built=True)
