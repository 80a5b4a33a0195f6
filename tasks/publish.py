"""Publish the release of an order: stored, and registered once under its order digest."""

import json
import logging

from prefect import task

from compressors.contracts import Artifact, artifact_name, digest
from infra.errors import ArtifactDamaged, ArtifactMissing
from infra.registry.mlflow_registry import Registered
from infra.settings import load_settings, shown
from infra.store.temporary import scratch_folder
from tasks.orchestration.documents import (
    MARKDOWN,
    PAGE,
    REPORT,
    Finished,
    Report,
    page_reference,
    report_of,
)
from tasks.orchestration.order_records import finished, write_finished
from tasks.orchestration.policy import KEPT
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import registry, repair
from tasks.report.page import page, validation_of
from tasks.report.tables import markdown

log = logging.getLogger(__name__)
CANDIDATE = "candidate"
OUTCOME_TAG = "recpress.outcome"
PLAN_CHARACTERS = 50_000  # a registry's tag can store twice as many


@task(task_run_name="publish {report.name}", **KEPT)
def publish(report: Report) -> Finished:
    """Store the report as JSON, Markdown and HTML, then register one version per order.

    The version has all its tags from its creation. The alias ``candidate`` moves to
    it if the order was accepted.

    Args:
        report: the order's report.
    """
    with scratch_folder("publish") as scratch:
        (scratch / REPORT).write_text(report.model_dump_json(indent=1))
        (scratch / MARKDOWN).write_text(markdown(report))
        (scratch / PAGE).write_text(page(report, validation_of(report.validation)))
        release = store().put(scratch)
    uri = load_settings().registry_uri
    registered = _register(report, release)
    if artifact_name(registered.source) != release.sha256:
        # Another process completed the same order first. Its release is the version, so its report
        # is the result, not the one measured here.
        release = store().artifact(registered.source)
        report = report_of(release)
    if report.outcome == "accepted":
        registry().point(report.name, CANDIDATE, registered.version)
    result = Finished(
        report=report, release=release, version=registered.version, registry=shown(uri)
    )
    write_finished(result)
    log.info("%s version %s: %s", report.name, registered.version, report.outcome)
    return result


def restore(model: str | None) -> tuple[Registered, ...]:
    """Register every finished order of the store that the registry lacks.

    Use it for a registry that was lost. Versions are registered in their earlier order, so an empty
    registry gives them the same numbers if none is missing. The champion is set from the ledger;
    the newest accepted version becomes the candidate if there is none.

    Args:
        model: only orders of this model; None for all.

    Returns:
        The versions that were registered.
    """
    orders = (key.removeprefix("orders/").removesuffix(".json") for key in store().keys("orders/"))
    every = (finished(order, registered=False) for order in sorted(orders))
    results = [found for found in every if found is not None]
    results = [found for found in results if model in (None, found.report.name)]
    results.sort(key=lambda found: (found.report.name, int(found.version)))
    restored = tuple(
        _register(found.report, found.release)
        for found in results
        if registry().by_order(found.report.order, found.report.name) is None
    )
    names = tuple(dict.fromkeys(found.report.name for found in results))
    for name in names:
        versions = registry().versions(name)
        accepted = [item for item in versions if item.tags.get(OUTCOME_TAG) == "accepted"]
        if accepted and not any(CANDIDATE in item.aliases for item in versions):
            registry().point(name, CANDIDATE, accepted[0].version)
    for name in names:  # last: it raises if the champion's order is in no record of the store
        repair(name, expected=True)
    return restored


def is_registered(found: Finished) -> bool:
    """Return whether this process's registry has a finished order under this version.

    A result from another registry contains that registry and its version number there.
    """
    held = registry().by_order(found.report.order, found.report.name)
    here = shown(load_settings().registry_uri)
    return held is not None and found.registry == here and held.version == found.version


def still_published(found: Finished) -> None:
    """Raise if the registry or the store no longer has a recorded result.

    Raises:
        ArtifactMissing: so that it is published again.
        ArtifactDamaged: its report is not the report of its release.
    """
    if report_of(found.release) != found.report:
        raise ArtifactDamaged("report_differs", order=found.report.order)
    if not is_registered(found):
        raise ArtifactMissing("order_no_longer_in_registry", order=found.report.order)


def _register(report: Report, release: Artifact) -> Registered:
    return registry().publish(
        report.name,
        report.order,
        store().reference(release),
        _tags(report, release),
        f"{report.outcome}: {', '.join(step['kind'] for step in report.recipe)}. "
        f"Report: {page_reference(release)}",
    )


def _tags(report: Report, release: Artifact) -> dict[str, str]:
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
        "recpress.plan": _plan_tag(report),
    }
    for target in report.targets:
        tags[f"recpress.verdict.{target.target}"] = target.verdict.outcome
        tags[f"recpress.artifact.{target.target}"] = store().reference(target.artifact)
        tags[f"recpress.sha256.{target.target}"] = target.artifact.sha256
        tags[f"recpress.graphs.{target.target}"] = ", ".join(
            graph.name for graph in target.lowering.graphs
        )
    return tags


def _plan_tag(report: Report) -> str:
    """Return the plan as a tag, or its digest if it is too long (thousands of tables)."""
    lines = {line.module: f"{line.format}, {line.bytes_after} bytes" for line in report.plan.lines}
    text = json.dumps(lines)
    return text if len(text) <= PLAN_CHARACTERS else f"sha256:{digest(report.plan)}"
