"""Publish an order's release: store its report and register it as a version in the registry.

The ledger is the list of a model's promotions and rollbacks in the store.
"""

import json
import logging

from prefect import task

from compressors.contracts import Artifact, artifact_name, digest
from infra.errors import ArtifactDamaged, ArtifactMissing
from infra.registry.mlflow_registry import RegisteredVersion
from infra.settings import load_settings, public_uri
from infra.store.temporary import scratch_folder
from tasks.orchestration.documents import (
    MARKDOWN,
    PAGE,
    REPORT,
    Finished,
    Report,
    page_reference,
    read_report,
)
from tasks.orchestration.order_records import find_finished_order, write_finished
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import registry, repair
from tasks.report.page import page, read_validation
from tasks.report.tables import markdown

log = logging.getLogger(__name__)
CANDIDATE = "candidate"
OUTCOME_TAG = "recpress.outcome"
PLAN_CHARACTERS = 50_000
"""Largest length of a plan in a tag; a longer plan is replaced by its digest.

The registry's limit is twice as high.
"""


@task(task_run_name="publish {report.name}", **TASK_OPTIONS)
def publish(report: Report) -> Finished:
    """Store the report as JSON, Markdown and HTML, then register it as one version.

    An order has only one version: if it is already registered, that version is the result. If the
    order was accepted, the alias ``candidate`` is moved to the version.

    Args:
        report: the order's report.
    """
    with scratch_folder("publish") as scratch:
        (scratch / REPORT).write_text(report.model_dump_json(indent=1))
        (scratch / MARKDOWN).write_text(markdown(report))
        (scratch / PAGE).write_text(page(report, read_validation(report.validation)))
        release = store().put(scratch)
    uri = load_settings().registry_uri
    registered = _register_release(report, release)
    if artifact_name(registered.source) != release.sha256:
        # Another process has registered the same order first. Its report, not this one, is the
        # result.
        release = store().artifact(registered.source)
        report = read_report(release)
    if report.outcome == "accepted":
        registry().set_alias(report.name, CANDIDATE, registered.version)
    result = Finished(
        report=report, release=release, version=registered.version, registry=public_uri(uri)
    )
    write_finished(result)
    log.info("%s version %s: %s", report.name, registered.version, report.outcome)
    return result


def restore(model: str | None) -> tuple[RegisteredVersion, ...]:
    """Rebuild a lost registry: register every finished order of the store that it lacks.

    Orders are registered by ascending former version number, so an empty registry assigns the
    former numbers again if no order is missing. The champion is set from the promotion ledger. A
    model without a candidate gets its newest accepted version as candidate.

    Args:
        model: only orders of this model; None for all.

    Returns:
        The versions that were registered.
    """
    orders = (key.removeprefix("orders/").removesuffix(".json") for key in store().keys("orders/"))
    records = (find_finished_order(order, registered=False) for order in sorted(orders))
    results = [result for result in records if result is not None]
    results = [result for result in results if model in (None, result.report.name)]
    results.sort(key=lambda result: (result.report.name, int(result.version)))
    restored = tuple(
        _register_release(result.report, result.release)
        for result in results
        if registry().find_by_order(result.report.order, result.report.name) is None
    )
    names = tuple(dict.fromkeys(result.report.name for result in results))
    for name in names:
        versions = registry().versions(name)
        accepted = [item for item in versions if item.tags.get(OUTCOME_TAG) == "accepted"]
        # ``versions`` lists the newest first.
        if accepted and not any(CANDIDATE in item.aliases for item in versions):
            registry().set_alias(name, CANDIDATE, accepted[0].version)
    # ``repair`` sets the alias of the champion and the Triton repository from the ledger. It comes
    # last, since it raises if no stored record has the champion's order.
    for name in names:
        repair(name, after_change=True)
    return restored


def is_registered(result: Finished) -> bool:
    """Return whether this process's registry has a finished order under the version it names.

    False for a result from another registry, even if the version numbers are equal.
    """
    registered = registry().find_by_order(result.report.order, result.report.name)
    this_registry = public_uri(load_settings().registry_uri)
    return (
        registered is not None
        and result.registry == this_registry
        and registered.version == result.version
    )


def require_published(result: Finished) -> None:
    """Raise if the store or the registry no longer has a recorded result of ``publish``.

    Raises:
        ArtifactMissing: the order is not in the registry, so it must be published again.
        ArtifactDamaged: its report is not the report of its release.
    """
    if read_report(result.release) != result.report:
        raise ArtifactDamaged("report_differs", order=result.report.order)
    if not is_registered(result):
        raise ArtifactMissing("order_no_longer_in_registry", order=result.report.order)


def _register_release(report: Report, release: Artifact) -> RegisteredVersion:
    """Register a release with all its tags, or return the version that has its order."""
    return registry().publish(
        report.name,
        report.order,
        store().reference(release),
        _build_version_tags(report, release),
        f"{report.outcome}: {', '.join(step['kind'] for step in report.recipe)}. "
        f"Report: {page_reference(release)}",
    )


def _build_version_tags(report: Report, release: Artifact) -> dict[str, str]:
    tags = {
        "recpress.order": report.order,
        "recpress.release": release.sha256,
        "recpress.report": page_reference(release),
        OUTCOME_TAG: report.outcome,
        "recpress.bundle": f"{report.name}@{report.bundle_version}",
        "recpress.parents": report.source.sha256,
        "recpress.compressed": report.compressed.sha256,
        "recpress.recipe": json.dumps(list(report.recipe)),
        "recpress.limits": "; ".join(str(limit) for limit in report.limits),
        "recpress.plan": _build_plan_tag(report),
    }
    for target in report.targets:
        tags[f"recpress.verdict.{target.target}"] = target.verdict.outcome
        tags[f"recpress.artifact.{target.target}"] = store().reference(target.artifact)
        tags[f"recpress.sha256.{target.target}"] = target.artifact.sha256
        tags[f"recpress.graphs.{target.target}"] = ", ".join(
            graph.name for graph in target.lowering.graphs
        )
    if report.other_metrics:
        tags["recpress.outputs"] = _build_outputs_tag(report)
    return tags


def _build_outputs_tag(report: Report) -> str:
    """Return the quality of each of several outputs as JSON: by metric, its value and its change.

    The numbers were measured on the first measured target; null if there is none.
    """
    numbers = None if report.measurement is None else report.measurement.numbers
    outputs = {}
    for name in report.metrics:
        value = None if numbers is None else numbers.of(name, "absolute")
        change = None if numbers is None else numbers.of(name, "baseline")
        outputs[name] = {
            "value": None if value is None else value.point,
            "change": None if change is None else change.point,
        }
    return json.dumps(outputs)


def _build_plan_tag(report: Report) -> str:
    """Return the plan as JSON for a tag; its digest if it is too long (thousands of tables)."""
    lines = {line.module: f"{line.format}, {line.bytes_after} bytes" for line in report.plan.lines}
    text = json.dumps(lines)
    return text if len(text) <= PLAN_CHARACTERS else f"sha256:{digest(report.plan)}"
