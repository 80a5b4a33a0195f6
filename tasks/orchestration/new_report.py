"""Build the report of an order from the stored results of its tasks. No Prefect."""

import json
from collections.abc import Mapping
from typing import Any

from compressors.contracts import Artifact, Limit, Plan, Verdict, overall
from compressors.contracts.reasons import Reason
from infra.bundle.bundle_folder import read
from infra.bundle.json_reader import read_limited
from tasks.bundles.bundle_ref import BundleRef
from tasks.orchestration.code_digest import recpress_version
from tasks.orchestration.documents import (
    STAGES,
    Report,
    Reproduction,
    Stages,
    TargetReport,
    read_measurement,
)
from tasks.orchestration.graph_documents import build_record, read_lowering, served_bytes
from tasks.orchestration.workspace import local


def build_report(
    *,
    order: str,
    bundle: BundleRef,
    compressed: Artifact,
    champions: Mapping[str, Artifact],
    recipe: tuple[dict[str, Any], ...],
    limits: tuple[Limit, ...],
    baselines: Mapping[str, Artifact],
    built: dict[str, Artifact],
    required: dict[str, bool],
    verdicts: dict[str, Verdict],
    skipped: dict[str, str],
    left_out: dict[str, Reason],
    remarks: tuple[Reason, ...] = (),
    stages: Artifact,
    measurements: Mapping[str, Artifact],
    validation: Artifact,
    reproduction: Reproduction,
) -> Report:
    """Build a report from the stored results of the tasks.

    Args:
        order: digest of the order.
        bundle: the bundle of the order.
        compressed: the compressed bundle.
        champions: the champion's graphs or engines, by target.
        recipe: the steps as JSON.
        limits: the order's limits.
        baselines: the untouched model's graphs or engines, by target.
        built: the compressed model's graphs or engines, by target.
        required: whether the order requires the target, by target.
        verdicts: the verdicts, by target.
        skipped: reasons of skipped optional targets, by target.
        left_out: reasons of skipped steps, by kind.
        remarks: other decisions of the run.
        stages: the result of ``measure_stages``.
        measurements: the results of ``measure``, by target, in the order of the targets.
        validation: the result of ``validate``.
        reproduction: how to run the order again.
    """
    plan = read(local(compressed)).plan
    measured = {target: read_measurement(item) for target, item in measurements.items()}
    first, *others = measured or list(baselines)[:1]  # names of targets
    return Report(
        order=order,
        recpress_version=recpress_version(),
        name=bundle.name,
        bundle_version=bundle.version,
        metric=bundle.metrics[0],
        other_metrics=bundle.metrics[1:],
        source=bundle.artifact,
        compressed=compressed,
        champion=champions.get(first),
        other_champions={name: champions[name] for name in others if name in champions},
        recipe=recipe,
        limits=limits,
        plan=plan if plan is not None else Plan(),
        outcome=overall(verdicts.values()),
        targets=tuple(
            _build_target_report(target, artifact, required[target], verdicts[target])
            for target, artifact in built.items()
        ),
        skipped=skipped,
        idle_reasons=left_out,
        remark_reasons=(*remarks, *(plan.reasons if plan is not None else ())),
        stages=Stages.validate_json(read_limited(local(stages) / STAGES)),
        baseline_bytes=served_bytes(local(baselines[first])),
        measurement=measured.get(first),
        other_measurements={name: measured[name] for name in others},
        validation=validation,
        calibrated_on=f"{bundle.calibration()} ({bundle.rows[bundle.calibration()]:,} rows)",
        reproduction=reproduction,
    )


def _build_target_report(
    target: str, artifact: Artifact, required: bool, verdict: Verdict
) -> TargetReport:
    folder = local(artifact)
    lowering = read_lowering(folder)
    audits = {
        graph.name: json.loads(read_limited(path))["audit"]
        for graph in lowering.graphs
        if (path := folder / build_record(graph.name)).exists()
    }
    return TargetReport(
        target=target,
        required=required,
        artifact=artifact,
        bytes=served_bytes(folder),
        verdict=verdict,
        lowering=lowering,
        audits=audits,
    )
