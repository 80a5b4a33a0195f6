"""The flow of one order: pull, validate, compress, lower, build, measure, gate, publish.

Every task's result is cached by content, so a killed flow resumes where it stopped, and a repeated
order only reads cached results.
"""

import logging
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from compressors.contracts import limit_warnings
from flows.choosing import require_taught
from flows.memory import require_order_memory, what_ran
from flows.order import Order
from flows.resolve import (
    by_other_version,
    carried_out_before,
    champions_of,
    promote_if_ordered,
    require_registry,
    teachers_of,
)
from flows.run import Run
from flows.server.embedded_server import protect_ephemeral_server
from flows.stages import (
    build_baselines,
    build_targets,
    compress_model,
    judge_targets,
    measure_result,
    prepare_data,
    publish_result,
    pull_model,
)
from infra.credentials import clean_exceptions
from infra.memory import memory_errors
from tasks.bundles.bundle_ref import find, require_measurable
from tasks.orchestration import log_lines
from tasks.orchestration.documents import Finished
from tasks.orchestration.outages import wait_out
from tasks.orchestration.policy import NO_RESULTS
from tasks.orchestration.progress import Progress, show_log_lines

log = logging.getLogger(__name__)
log_lines.install()

# A call of the flow in Python, without a configured server, makes Prefect start one.
protect_ephemeral_server()


@flow(name="compress", flow_run_name="{order.model} {order.preset}", **NO_RESULTS)
@clean_exceptions()
def compress(order: Order) -> Finished | State[Any]:
    """Compress a model, judge what will be served, and register the result.

    A rejected or undecided candidate is a result, not a crash: the run completes with that name.
    """
    show_log_lines()
    subject = wait_out(lambda: find(order.model))
    require_measurable(subject, order.limits)
    for warning in limit_warnings(order.limits):
        log.warning("%s", warning)
    require_taught(order)
    estimate = require_order_memory(order, subject)
    wait_out(require_registry)
    teachers = wait_out(lambda: teachers_of(order, subject))
    champions = wait_out(lambda: champions_of(order, subject))
    before = wait_out(lambda: by_other_version(order, subject, champions, teachers))
    if before is not None:
        log.info("%s", carried_out_before(before))
        wait_out(lambda: promote_if_ordered(order, before))
        return _ended(before)
    progress = Progress(stages=8 + len(order.recipe()) + 2 * len(order.targets.wanted()))
    run = Run(order, subject, teachers, champions, progress)
    with memory_errors(what_ran(lambda: progress.current, estimate, subject)):
        return _carry_out(run)


def _carry_out(run: Run) -> Finished | State[Any]:
    pull_model(run)
    data = prepare_data(run)
    baselines = build_baselines(run, data)
    compressed = compress_model(run, data)
    built = build_targets(run, compressed.bundle, data, baselines)
    measured = measure_result(run, data, baselines, compressed, built)
    verdicts = judge_targets(run, built, measured)
    return _ended(publish_result(run, data, baselines, compressed, built, measured, verdicts))


def _ended(finished: Finished) -> Finished | State[Any]:
    """Return the final state of the run, named after the outcome if it is not accepted."""
    report = finished.report
    if report.outcome in {"accepted", "built-unmeasured"}:
        return finished
    reasons = "; ".join(target.verdict.reason for target in report.targets)
    return Completed(name=report.outcome.capitalize(), message=reasons, data=finished)
