"""The Prefect flow ``compress``: runs all phases of one order (``phases.py``).

The result of every task is cached by a hash of its inputs. A flow that was killed therefore
resumes where it stopped, and a repeated order only reads cached results. These results are records
in recpress's object store; ``NO_RESULTS`` switches off Prefect's storage of results. ``wait_out``
repeats a call for up to ten minutes while a service does not respond. ``clean_exceptions`` removes
credentials from error messages.
"""

import logging
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from compressors.contracts import limit_warnings
from flows.memory import describe_running_phase, require_order_memory
from flows.order import Order
from flows.phases import (
    build_baselines,
    build_targets,
    compress_model,
    judge_targets,
    measure_result,
    prepare_data,
    publish_result,
    pull_model,
)
from flows.resolve import (
    find_champions,
    find_result_of_other_version,
    format_already_completed,
    promote_if_ordered,
    require_registry,
    resolve_teachers,
)
from flows.run import Run
from flows.server.embedded_server import protect_ephemeral_server
from flows.step_selection import require_teachers_are_used
from infra.credentials import clean_exceptions
from infra.memory import memory_errors
from tasks.bundles.bundle_ref import find_bundle, require_measurable
from tasks.orchestration import log_lines
from tasks.orchestration.documents import Finished
from tasks.orchestration.outages import wait_out
from tasks.orchestration.progress import Progress, show_log_lines
from tasks.orchestration.task_calls import NO_RESULTS

log = logging.getLogger(__name__)
log_lines.install()  # escapes names from bundles in log messages

PHASES_OF_EVERY_ORDER = 8
"""Number of phases that do not depend on the recipe or the targets.

They are: pull, validate the data, prepare tensors, lower the untouched model, measure, evaluate the
stages (the model after each step), judge, publish.
"""

# Prefect starts a server if Python code calls the flow and no server is configured. This call makes
# such a server require a secret of its clients.
protect_ephemeral_server()


@flow(name="compress", flow_run_name="{order.model} {order.preset}", **NO_RESULTS)
@clean_exceptions()
def compress(order: Order) -> Finished | State[Any]:
    """Compress a model, compare the result with the limits for each target, and register it.

    A rejected or undecided result is not a failure: the run completes, and its state in Prefect is
    named Rejected or Undecided. If another version of recpress has completed the same order, its
    result is returned.
    """
    show_log_lines()
    bundle = wait_out(lambda: find_bundle(order.model))
    require_measurable(bundle, order.limits)
    for warning in limit_warnings(order.limits):
        log.warning("%s", warning)
    require_teachers_are_used(order)
    estimate = require_order_memory(order, bundle)
    wait_out(require_registry)
    teachers = wait_out(lambda: resolve_teachers(order, bundle))
    champions = wait_out(lambda: find_champions(order, bundle))
    completed = wait_out(lambda: find_result_of_other_version(order, bundle, champions, teachers))
    if completed is not None:
        log.info("%s", format_already_completed(completed))
        wait_out(lambda: promote_if_ordered(order, completed))
        return _build_final_state(completed)
    target_phases = 2 * len(order.targets.requirements())  # lower and build
    progress = Progress(phases=PHASES_OF_EVERY_ORDER + len(order.recipe()) + target_phases)
    run = Run(order, bundle, teachers, champions, progress)
    with memory_errors(describe_running_phase(lambda: progress.current, estimate, bundle)):
        return _run_phases(run)


def _run_phases(run: Run) -> Finished | State[Any]:
    pull_model(run)
    data = prepare_data(run)
    baselines = build_baselines(run, data)
    compressed = compress_model(run, data)
    built = build_targets(run, compressed.bundle, data, baselines)
    measured = measure_result(run, data, baselines, compressed, built)
    verdicts = judge_targets(run, built, measured)
    finished = publish_result(run, data, baselines, compressed, built, measured, verdicts)
    return _build_final_state(finished)


def _build_final_state(finished: Finished) -> Finished | State[Any]:
    """Return a state named after the outcome if that is rejected or undecided, else the result."""
    report = finished.report
    if report.outcome in {"accepted", "built-unmeasured"}:
        return finished
    reasons = "; ".join(target.verdict.reason for target in report.targets)
    return Completed(name=report.outcome.capitalize(), message=reasons, data=finished)
