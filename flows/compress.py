"""The way of one model: pull, validate, compress, lower, build, measure, gate, publish.

Every task's result is found again by content, so a flow that was killed goes on where it was,
and an order that was carried out before is one cache hit after another.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from compressors.contracts import Artifact, TargetKind, Verdict, digest, limit_warnings
from compressors.errors.compression import CompressionError
from compressors.errors.orders import OrderRefused
from flows.choosing import require_taught
from flows.embedded_server import protect_ephemeral_server
from flows.memory import require_order_memory, what_ran
from flows.order import Order
from flows.recipe import carry_out, measure_recipe_stages, ranking_of
from flows.resolve import (
    by_other_version,
    carried_out_before,
    champion_of,
    code_of,
    order_digest,
    promote_if_ordered,
    request_digest,
    require_registry,
    teachers_of,
)
from infra.credentials import clean_exceptions
from infra.errors import InfraError, OutOfMemory, Refused
from infra.memory import memory_errors
from tasks.build import build, require_builder
from tasks.bundles.bundle_ref import BundleRef, find, require_measurable
from tasks.bundles.teachers import Teacher
from tasks.gate import gate
from tasks.lower import lower_model
from tasks.measure import measure
from tasks.orchestration import log_lines
from tasks.orchestration.documents import Finished, report_from
from tasks.orchestration.order_records import write_request
from tasks.orchestration.outages import wait_out
from tasks.orchestration.policy import NO_RESULTS, kept, remembered
from tasks.orchestration.progress import Progress, publish_links, show_log_lines
from tasks.prepare import prepare
from tasks.publish import publish, still_published
from tasks.pull import pull
from tasks.validate import validate

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
    champion = wait_out(lambda: champion_of(order, subject))
    before = wait_out(lambda: by_other_version(order, subject, champion, teachers))
    if before is not None:
        log.info("%s", carried_out_before(before))
        wait_out(lambda: promote_if_ordered(order, before))
        return _ended(before)
    progress = Progress(stages=8 + len(order.recipe()) + 2 * len(order.targets.wanted()))
    with memory_errors(what_ran(lambda: progress.current, estimate, subject)):
        return _compress(order, subject, teachers, champion, progress)


def _compress(
    order: Order,
    subject: BundleRef,
    teachers: tuple[Teacher, ...],
    champion: Artifact | None,
    progress: Progress,
) -> Finished | State[Any]:
    code = code_of(order, subject)
    targets = order.targets.wanted()
    progress.stage(f"pull {subject.name} {subject.version}")
    for target, wanted in targets.items():
        if wanted == "required":
            require_builder(target)
    bundle = kept(pull, artifact=subject.artifact, code=code)
    for teacher in teachers:
        kept(pull, artifact=teacher.artifact, code=digest([code, teacher.architecture]))
    progress.stage("validate the data")
    validation = kept(validate, bundle=bundle, rules=order.rules, code=code)
    progress.stage("prepare tensors")
    calibrated_on = subject.calibration()
    test = kept(prepare, bundle=bundle, split="test", code=code)
    ranking = ranking_of(subject, bundle, code)
    lowering = {
        "probe": kept(prepare, bundle=bundle, split=calibrated_on, code=code),
        "probe_rows": subject.rows[calibrated_on],
        "most_rows": 65_536,
        "code": code,
    }
    progress.stage("lower the untouched model")
    baseline = kept(lower_model, bundle=bundle, target="onnxruntime", **lowering)

    compressed = carry_out(order, subject, bundle, teachers, code, progress)
    excluded: dict[str, str] = {}
    while refused := _not_servable(order, compressed.bundle, lowering, excluded):
        excluded |= refused
        compressed = carry_out(order, subject, bundle, teachers, code, progress, excluded)
    candidate = compressed.bundle

    built: dict[TargetKind, Artifact] = {}
    skipped: dict[str, str] = {}
    for target, wanted in targets.items():
        try:
            progress.stage(f"lower for {target}")
            graph = kept(lower_model, bundle=candidate, target=target, **lowering)
            progress.stage(f"build {target}")
            built[target] = _built(order, subject, target, graph, code)
        except (CompressionError, Refused, InfraError) as fault:
            if wanted == "required" or isinstance(fault, OutOfMemory):
                raise
            log.warning("%s is optional and left out: %s", target, fault)
            skipped[target] = str(fault)

    if not built:
        raise OrderRefused("no_target_built", reasons=skipped)

    progress.stage("measure")
    measurement = None
    if "onnxruntime" in built:
        measurement = kept(
            measure,
            bundle=bundle,
            baseline=baseline,
            candidate=built["onnxruntime"],
            champion=champion,
            test=test,
            test_rows=subject.rows["test"],
            ranking=ranking,
            seed=order.seed,
            code=code,
        )
    progress.stage("weigh the stages")
    stages = measure_recipe_stages(compressed, subject, test, ranking, order.seed, code)
    progress.stage("judge")
    verdicts: dict[TargetKind, Verdict] = {
        target: remembered(
            gate,
            target=target,
            limits=order.limits,
            measurement=measurement if target == "onnxruntime" else None,
            code=code,
        )
        for target in built
    }
    progress.stage("publish")
    write_report = functools.partial(
        report_from,
        order=order_digest(order, subject, champion, teachers),
        subject=subject,
        compressed=candidate,
        champion=champion,
        recipe=tuple(step.model_dump(mode="json") for step in compressed.recipe()),
        limits=order.limits,
        baseline=baseline,
        built=built,
        required={target: wanted == "required" for target, wanted in targets.items()},
        verdicts=verdicts,
        skipped=skipped,
        left_out=compressed.left_out(),
        remarks=compressed.remarks,
        stages=stages,
        measurement=measurement,
        validation=validation,
        reproduction=order.reproduction(
            f"{subject.name}@{subject.version}", tuple(held.artifact.uri for held in teachers)
        ),
    )
    report = wait_out(write_report)
    request = request_digest(order, subject, champion, teachers)
    wait_out(lambda: write_request(request, report.order))
    finished: Finished = remembered(publish, still_published, report=report, code=code)
    wait_out(lambda: promote_if_ordered(order, finished))
    wait_out(lambda: publish_links(finished))
    progress.finish()
    return _ended(finished)


def _ended(finished: Finished) -> Finished | State[Any]:
    """How the run ends: a candidate that is not accepted gives its state a name of its own."""
    report = finished.report
    if report.outcome in {"accepted", "built-unmeasured"}:
        return finished
    reasons = "; ".join(target.verdict.reason for target in report.targets)
    return Completed(name=report.outcome.capitalize(), message=reasons, data=finished)


def _not_servable(
    order: Order, bundle: Artifact, lowering: dict[str, Any], excluded: Mapping[str, str]
) -> dict[str, str]:
    """Units of a preset's result because of which a required target cannot be lowered.

    Raises:
        CompressionError: a unit is not known to be the cause, or is excluded already.
    """
    for target, wanted in order.targets.wanted().items():
        if order.preset == "custom" or wanted != "required":
            continue
        try:
            kept(lower_model, bundle=bundle, target=target, **lowering)
        except CompressionError as fault:
            units = [name for name in fault.units if name not in excluded]
            if not units:
                raise
            log.warning("%s: %s; without them the recipe runs again", ", ".join(units), fault)
            return dict.fromkeys(units, " ".join(str(fault).split()).rstrip("."))
    return {}


def _built(
    order: Order, subject: BundleRef, target: TargetKind, graph: Artifact, code: str
) -> Artifact:
    """What the target loads: the graph itself, or an engine made from it."""
    if target == "onnxruntime":
        return graph
    return kept(
        build,
        lowered=graph,
        target=target,
        batch=order.targets.batch(),
        longest=subject.longest,
        seconds=order.targets.build_seconds,
        code=code,
    )
