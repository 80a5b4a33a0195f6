"""The phases of an order in sequence, one function each; ``flows/compress.py`` calls them.

A function receives the run context and the results of earlier phases. To lower a model is to write
it as a graph for a target; to build is to make an engine from the graph, if the target needs one.
``wait_out`` calls a function, and repeats the call while a service does not respond.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compressors.contracts import TARGETS, Artifact, Verdict
from compressors.contracts.output_metrics import metrics_measured_for_limits
from compressors.errors.compression import CompressionError
from compressors.errors.orders import OrderRefused
from flows.recipe import Compressed, apply_recipe, check_teachers, measure_recipe_stages
from flows.resolve import order_digest, promote_if_ordered, request_digest
from flows.run import Run
from infra.bundle.bundle_folder import read
from infra.errors import InfraError, OutOfMemory, Refused
from tasks.build import build, require_builder
from tasks.gate import gate
from tasks.lower import lower_model
from tasks.measure import measure
from tasks.orchestration.documents import Finished, PreparedRows, Ranking
from tasks.orchestration.new_report import build_report
from tasks.orchestration.order_records import write_request
from tasks.orchestration.outages import wait_out
from tasks.orchestration.progress import create_report_artifacts
from tasks.orchestration.workspace import local
from tasks.publish import publish, require_published
from tasks.pull import pull
from tasks.retrieval.encode_items import encode_items
from tasks.target_adapters import machine_of
from tasks.validate import validate

log = logging.getLogger(__name__)

MAX_BATCH_ROWS = 65_536
"""The largest batch that a lowered graph must accept."""


@dataclass(frozen=True)
class PreparedData:
    """The model's data, checked and converted to tensors.

    Attributes:
        validation: the results of the data checks (not the validation split).
        test: the rows on which the result is measured.
        probe: the rows for which a lowered graph must return the scores of the PyTorch module.
        ranking: for a retrieval model, the catalogue, and the items that each user has already
            seen; None for other tasks.
    """

    validation: Artifact
    test: PreparedRows
    probe: PreparedRows
    ranking: Ranking | None


@dataclass(frozen=True)
class BuiltTargets:
    """What was built for each target.

    Attributes:
        artifacts: the graphs or engines, by target.
        skipped: why other targets were skipped, by target.
    """

    artifacts: dict[str, Artifact]
    skipped: dict[str, str]


@dataclass(frozen=True)
class MeasuredResult:
    """The measurements of a result.

    Attributes:
        served: measurements of the served graphs or engines, by target.
        stages: bytes and quality of each stage (the model after a step), measured in PyTorch.
    """

    served: dict[str, Artifact]
    stages: Artifact


def pull_model(run: Run) -> None:
    """Fetch and verify the bundles of model and teachers; check that required targets can be built.

    Raises:
        Refused: a required target cannot be built on this machine, or a bundle is damaged.
    """
    run.progress.start_phase(f"pull {run.model.name} {run.model.version}")
    for target, requirement in run.order.targets.requirements().items():
        if requirement == "required":
            require_builder(target)
    run.call(pull, artifact=run.model.artifact)
    for teacher in run.teachers:
        if not teacher.columns:  # else its predictions are columns of the model's data
            run.call_for(teacher, pull, artifact=teacher.artifact)


def prepare_data(run: Run) -> PreparedData:
    """Check the data and convert it to tensors.

    Raises:
        DataRefused: a check failed, or the data cannot be used to measure the model.
    """
    run.progress.start_phase("validate the data")
    validation = run.call(validate, bundle=run.model.artifact, rules=run.order.rules)
    run.progress.start_phase("prepare tensors")
    test = run.prepare_split("test")
    ranking = run.prepare_ranking()
    check_teachers(run)
    probe = run.prepare_split(run.model.calibration())  # the training split if there is none
    return PreparedData(validation, test, probe, ranking)


def compress_model(run: Run, data: PreparedData) -> Compressed:
    """Apply the recipe.

    If units that a preset has compressed prevent the lowering for a required target, the preset is
    applied again and does not change these units.

    Raises:
        CompressionError: no step fits, or a required target cannot be lowered.
    """
    compressed = apply_recipe(run)
    excluded: dict[str, str] = {}
    while units := _find_units_that_prevent_lowering(run, compressed.bundle, data, excluded):
        excluded |= units
        compressed = apply_recipe(run, excluded)
    return compressed


def build_baselines(run: Run, data: PreparedData) -> BuiltTargets:
    """Lower and build the untouched model for each compared target, as the baseline of the result.

    Compared targets are the ordered ones that recpress can measure or, if there are none, the
    default target. An optional target that fails is skipped, unless no earlier target succeeded:
    the report needs the bytes of at least one baseline.
    """
    run.progress.start_phase("lower the untouched model")
    baselines = BuiltTargets({}, {})
    for target in run.order.targets.list_compared_targets():
        with _skip_if_optional(run, target, baselines, is_needed=not baselines.artifacts):
            graph = _lower(run, run.model.artifact, target, data)
            baselines.artifacts[target] = _build(run, target, graph)
    return baselines


def build_targets(
    run: Run, bundle: Artifact, data: PreparedData, baselines: BuiltTargets
) -> BuiltTargets:
    """Lower and build the result for each target; skip optional targets that cannot be built.

    Raises:
        CompressionError, Refused, InfraError: a required target cannot be built.
        OrderRefused: no target can be built.
    """
    result = BuiltTargets({}, dict(baselines.skipped))
    for target in run.order.targets.requirements():
        if target in baselines.skipped:
            continue
        with _skip_if_optional(run, target, result):
            run.progress.start_phase(f"lower for {target}")
            graph = _lower(run, bundle, target, data)
            run.progress.start_phase(f"build {target}")
            result.artifacts[target] = _build(run, target, graph)
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
    """Measure what was built, against the untouched model, for each target that can be measured.

    Also evaluate the model after each step of the recipe, in PyTorch.
    """
    run.progress.start_phase("measure")
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
            item_vectors=_encode_items(run, data, target, baselines.artifacts[target], candidate),
            metrics=metrics_measured_for_limits(run.model.outputs, run.limits),
            seed=run.order.seed,
        )
        for target, candidate in built.artifacts.items()
        if TARGETS[target].is_measured
    }
    run.progress.start_phase("evaluate the stages")
    return MeasuredResult(served, measure_recipe_stages(run, compressed, data.test, data.ranking))


def _encode_items(
    run: Run, data: PreparedData, target: str, baseline: Artifact, candidate: Artifact
) -> dict[str, Artifact]:
    """Return the vectors of all items, by model, for the graphs that ``measure`` compares.

    Empty for models that do not rank a catalogue.
    """
    if data.ranking is None:
        return {}
    models = {"baseline": baseline, "candidate": candidate}
    if target in run.champions:
        models["champion"] = run.champions[target]
    signature = wait_out(lambda: read(local(run.model.artifact))).signature
    return {
        name: run.call(
            encode_items,
            target=target,
            model=model,
            signature=signature,
            items=data.ranking.items,
            machine=machine_of(target),  # only for the cache key
        )
        for name, model in models.items()
    }


def judge_targets(run: Run, built: BuiltTargets, measured: MeasuredResult) -> dict[str, Verdict]:
    """Compare the order's limits with the measurements, for each target that was built."""
    run.progress.start_phase("judge")
    return {
        target: run.call(
            gate,
            target=target,
            limits=run.limits,
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
    run.progress.start_phase("publish")
    order, model = run.order, run.model
    write_report = functools.partial(
        build_report,
        order=order_digest(order, model, run.champions, run.teachers),
        bundle=model,
        compressed=compressed.bundle,
        champions=run.champions,
        recipe=tuple(step.model_dump(mode="json") for step in compressed.recipe()),
        limits=run.limits,
        baselines=baselines.artifacts,
        built=built.artifacts,
        required={
            target: requirement == "required"
            for target, requirement in order.targets.requirements().items()
        },
        verdicts=verdicts,
        skipped=built.skipped,
        left_out=compressed.skip_reasons_by_step(),
        remarks=compressed.remarks,
        stages=measured.stages,
        measurements=measured.served,
        validation=data.validation,
        reproduction=order.reproduction(
            f"{model.name}@{model.version}", tuple(teacher.reference for teacher in run.teachers)
        ),
    )
    report = wait_out(write_report)
    # The request is the order without the version of recpress, so that later versions find it.
    request = request_digest(order, model, run.champions, run.teachers)
    wait_out(lambda: write_request(request, report.order))
    finished = run.call(publish, require_published, report=report)
    wait_out(lambda: promote_if_ordered(order, finished))
    wait_out(lambda: create_report_artifacts(finished))
    run.progress.finish()
    return finished


def _find_units_that_prevent_lowering(
    run: Run, bundle: Artifact, data: PreparedData, excluded: Mapping[str, str]
) -> dict[str, str]:
    """Return the units of a preset's result that cannot be lowered for a required target.

    Returns:
        The reason for each unit; empty if every required target can be lowered.

    Raises:
        CompressionError: lowering fails, and the error names no unit that is not yet excluded.
    """
    for target, requirement in run.order.targets.requirements().items():
        if run.order.preset == "custom" or requirement != "required":
            continue
        try:
            _lower(run, bundle, target, data)
        except CompressionError as fault:
            units = [name for name in fault.units if name not in excluded]
            if not units:
                raise
            names = ", ".join(units)
            log.warning("%s: %s The recipe is applied again without them.", names, fault)
            return dict.fromkeys(units, " ".join(str(fault).split()).rstrip("."))
    return {}


@contextlib.contextmanager
def _skip_if_optional(
    run: Run, target: str, result: BuiltTargets, *, is_needed: bool = False
) -> Iterator[None]:
    """Catch an error of an optional target, and record it in ``result.skipped``.

    Args:
        run: the run context of the order.
        target: the target.
        result: receives the message of the error.
        is_needed: whether to raise the error also for an optional target.

    Raises:
        CompressionError, Refused, InfraError: the target is required, or ``is_needed`` is set.
        OutOfMemory: in any case.
    """
    try:
        yield
    except (CompressionError, Refused, InfraError) as fault:
        is_required = run.order.targets.requirements().get(target) != "optional"
        if is_required or is_needed or isinstance(fault, OutOfMemory):
            raise
        log.warning("Skipped optional target %s: %s", target, fault)
        result.skipped[target] = str(fault)


def _lower(run: Run, bundle: Artifact, target: str, data: PreparedData) -> Artifact:
    """Return the graph of a bundle for a target."""
    return run.call(
        lower_model,
        bundle=bundle,
        target=target,
        probe=data.probe.artifact,
        probe_rows=data.probe.rows,
        most_rows=MAX_BATCH_ROWS,  # per batch
    )


def _build(run: Run, target: str, graph: Artifact) -> Artifact:
    """Return the files that the target loads: the graph itself, or an engine built from it."""
    if not TARGETS[target].is_built:
        return graph
    return run.call(
        build,
        lowered=graph,
        target=target,
        batch=run.order.targets.batch_sizes(),
        longest=run.model.longest,  # maximum list length of each jagged input
        seconds=run.order.targets.build_seconds,
    )
