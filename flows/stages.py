"""The stages of an order, in sequence: arguments are the run and results of other stages."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compressors.contracts import TARGETS, Artifact, Verdict
from compressors.contracts.metrics import further_metrics
from compressors.errors.compression import CompressionError
from compressors.errors.orders import OrderRefused
from flows.recipe import Compressed, carry_out, measure_recipe_stages
from flows.resolve import order_digest, promote_if_ordered, request_digest
from flows.run import Run
from infra.errors import InfraError, OutOfMemory, Refused
from tasks.build import build, require_builder
from tasks.gate import gate
from tasks.lower import lower_model
from tasks.measure import measure
from tasks.orchestration.documents import Finished, PreparedRows, Ranking
from tasks.orchestration.new_report import report_from
from tasks.orchestration.order_records import write_request
from tasks.orchestration.outages import wait_out
from tasks.orchestration.progress import publish_links
from tasks.publish import publish, still_published
from tasks.pull import pull
from tasks.validate import validate

log = logging.getLogger(__name__)

MOST_ROWS = 65_536
"""The largest batch that a graph must accept."""


@dataclass(frozen=True)
class PreparedData:
    """The model's data, validated and as tensors.

    Attributes:
        validation: the results of the data checks.
        test: the rows for the measurement of the result.
        probe: the rows for the comparison of graphs with the module.
        ranking: the catalogue and seen items of a retrieval model; None for other tasks.
    """

    validation: Artifact
    test: PreparedRows
    probe: PreparedRows
    ranking: Ranking | None


@dataclass(frozen=True)
class BuiltTargets:
    """The files that each target loads, and why optional targets were skipped."""

    artifacts: dict[str, Artifact]
    skipped: dict[str, str]


@dataclass(frozen=True)
class MeasuredResult:
    """The measurements of what is served, by measured target, and each stage's quality."""

    served: dict[str, Artifact]
    stages: Artifact


def pull_model(run: Run) -> None:
    """Verify the bundle and the teachers' bundles, and require the builders of the targets.

    Raises:
        Refused: a required target cannot be built on this machine, or a bundle is damaged.
    """
    run.progress.stage(f"pull {run.model.name} {run.model.version}")
    for target, wanted in run.order.targets.wanted().items():
        if wanted == "required":
            require_builder(target)
    run.call(pull, artifact=run.model.artifact)
    for teacher in run.teachers:
        run.call_for(teacher, pull, artifact=teacher.artifact)


def prepare_data(run: Run) -> PreparedData:
    """Check the data and convert it to tensors.

    Raises:
        DataRefused: a check failed, or the model cannot be measured.
    """
    run.progress.stage("validate the data")
    validation = run.call(validate, bundle=run.model.artifact, rules=run.order.rules)
    run.progress.stage("prepare tensors")
    test = run.prepared("test")
    ranking = run.ranking()
    probe = run.prepared(run.model.calibration())
    return PreparedData(validation, test, probe, ranking)


def compress_model(run: Run, data: PreparedData) -> Compressed:
    """Apply the recipe.

    If units prevent the lowering of a required target, a preset is applied again without them.

    Raises:
        CompressionError: no step fits, or a required target cannot be lowered.
    """
    compressed = carry_out(run)
    excluded: dict[str, str] = {}
    while refused := _not_servable(run, compressed.bundle, data, excluded):
        excluded |= refused
        compressed = carry_out(run, excluded)
    return compressed


def build_baselines(run: Run, data: PreparedData) -> BuiltTargets:
    """Lower and build the untouched model, the baseline of the result, for each compared target.

    An optional target may be skipped, except the first, whose bytes the report compares.
    """
    run.progress.stage("lower the untouched model")
    baselines = BuiltTargets({}, {})
    for target in run.order.targets.compared():
        with _may_be_skipped(run, target, baselines, is_needed=not baselines.artifacts):
            graph = _lowered(run, run.model.artifact, target, data)
            baselines.artifacts[target] = _built(run, target, graph)
    return baselines


def build_targets(
    run: Run, bundle: Artifact, data: PreparedData, baselines: BuiltTargets
) -> BuiltTargets:
    """Lower and build the result for each target; an optional target may be skipped.

    Raises:
        CompressionError, Refused, InfraError: a required target cannot be built, or none was.
    """
    result = BuiltTargets({}, dict(baselines.skipped))
    for target in run.order.targets.wanted():
        if target in baselines.skipped:
            continue
        with _may_be_skipped(run, target, result):
            run.progress.stage(f"lower for {target}")
            graph = _lowered(run, bundle, target, data)
            run.progress.stage(f"build {target}")
            result.artifacts[target] = _built(run, target, graph)
    if not result.artifacts:
        raise OrderRefused("no_target_built", reasons=result.skipped)
    return result


def measure_result(
    run: Run,
    data: PreparedData,
    baselines: BuiltTargets,
    compressed: Compressed,
    built: BuiltTargets,
) -> MeasuredResult:
    """Measure the result for each measured target against the untouched model.

    Each stage of the recipe is evaluated in torch.
    """
    run.progress.stage("measure")
    served = {
        target: run.call(
            measure,
            target=target,
            bundle=run.model.artifact,
            baseline=baselines.artifacts[target],
            candidate=candidate,
            champion=run.champions.get(target),
            test=data.test.artifact,
            test_rows=data.test.rows,
            ranking=data.ranking,
            metrics=further_metrics(run.model.task, (item.metric for item in run.order.limits)),
            seed=run.order.seed,
        )
        for target, candidate in built.artifacts.items()
        if TARGETS[target].is_measured
    }
    run.progress.stage("evaluate the stages")
    return MeasuredResult(served, measure_recipe_stages(run, compressed, data.test, data.ranking))


def judge_targets(run: Run, built: BuiltTargets, measured: MeasuredResult) -> dict[str, Verdict]:
    """Judge the order's limits for each target that was built."""
    run.progress.stage("judge")
    return {
        target: run.call(
            gate,
            target=target,
            limits=run.order.limits,
            measurement=measured.served.get(target),
        )
        for target in built.artifacts
    }


def publish_result(
    run: Run,
    data: PreparedData,
    baselines: BuiltTargets,
    compressed: Compressed,
    built: BuiltTargets,
    measured: MeasuredResult,
    verdicts: dict[str, Verdict],
) -> Finished:
    """Store the report, register the release, and promote it if the order has ``promote``."""
    run.progress.stage("publish")
    order, model = run.order, run.model
    write_report = functools.partial(
        report_from,
        order=order_digest(order, model, run.champions, run.teachers),
        subject=model,
        compressed=compressed.bundle,
        champions=run.champions,
        recipe=tuple(step.model_dump(mode="json") for step in compressed.recipe()),
        limits=order.limits,
        baselines=baselines.artifacts,
        built=built.artifacts,
        required={
            target: wanted == "required" for target, wanted in order.targets.wanted().items()
        },
        verdicts=verdicts,
        skipped=built.skipped,
        left_out=compressed.left_out(),
        remarks=compressed.remarks,
        stages=measured.stages,
        measurements=measured.served,
        validation=data.validation,
        reproduction=order.reproduction(
            f"{model.name}@{model.version}", tuple(held.artifact.uri for held in run.teachers)
        ),
    )
    report = wait_out(write_report)
    request = request_digest(order, model, run.champions, run.teachers)
    wait_out(lambda: write_request(request, report.order))
    finished = run.call(publish, still_published, report=report)
    wait_out(lambda: promote_if_ordered(order, finished))
    wait_out(lambda: publish_links(finished))
    run.progress.finish()
    return finished


def _not_servable(
    run: Run, bundle: Artifact, data: PreparedData, excluded: Mapping[str, str]
) -> dict[str, str]:
    """Return units of a preset's result that prevent the lowering of a required target.

    Raises:
        CompressionError: no unit is known to be the cause, or it is already excluded.
    """
    for target, wanted in run.order.targets.wanted().items():
        if run.order.preset == "custom" or wanted != "required":
            continue
        try:
            _lowered(run, bundle, target, data)
        except CompressionError as fault:
            units = [name for name in fault.units if name not in excluded]
            if not units:
                raise
            log.warning("%s: %s; without them the recipe runs again", ", ".join(units), fault)
            return dict.fromkeys(units, " ".join(str(fault).split()).rstrip("."))
    return {}


@contextlib.contextmanager
def _may_be_skipped(
    run: Run, target: str, result: BuiltTargets, *, is_needed: bool = False
) -> Iterator[None]:
    """Record why an optional target cannot be built, instead of raising.

    Raises:
        CompressionError, Refused, InfraError: the target is required or needed.
    """
    try:
        yield
    except (CompressionError, Refused, InfraError) as fault:
        is_required = run.order.targets.wanted().get(target) != "optional"
        if is_required or is_needed or isinstance(fault, OutOfMemory):
            raise
        log.warning("%s is optional and left out: %s", target, fault)
        result.skipped[target] = str(fault)


def _lowered(run: Run, bundle: Artifact, target: str, data: PreparedData) -> Artifact:
    return run.call(
        lower_model,
        bundle=bundle,
        target=target,
        probe=data.probe.artifact,
        probe_rows=data.probe.rows,
        most_rows=MOST_ROWS,
    )


def _built(run: Run, target: str, graph: Artifact) -> Artifact:
    """Return the files that the target loads: the graph itself, or an engine built from it."""
    if not TARGETS[target].is_built:
        return graph
    return run.call(
        build,
        lowered=graph,
        target=target,
        batch=run.order.targets.batch(),
        longest=run.model.longest,
        seconds=run.order.targets.build_seconds,
    )
