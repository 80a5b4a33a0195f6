"""The release of an order: stored, registered once, and found again by its order digest."""

import json
import logging

from prefect import task

from compressors.contracts import Artifact, artifact_name, digest
from infra.errors import ArtifactMissing
from infra.registry import Registry
from infra.settings import load_settings, shown
from infra.temporary import scratch_folder
from tasks.documents import (
    MARKDOWN,
    PAGE,
    REPORT,
    Finished,
    Report,
    page_reference,
    report_of,
)
from tasks.order_records import write_finished
from tasks.policy import KEPT
from tasks.report import markdown
from tasks.report_page import page, validation_of
from tasks.stored import store

log = logging.getLogger(__name__)
PLAN_CHARACTERS = 50_000  # a registry's tag holds twice as many


@task(task_run_name="publish {report.name}", **KEPT)
def publish(report: Report, code: str) -> Finished:  # noqa: ARG001
    """Store the report as JSON, Markdown and a page, then register it: one version an order.

    The version carries all its tags from the moment it exists. The alias ``candidate`` moves to
    it if the order was accepted.

    Args:
        report: what the order came to.
        code: digest of the code that publishes; part of the cache key.
    """
    with scratch_folder("publish") as scratch:
        (scratch / REPORT).write_text(report.model_dump_json(indent=1))
        (scratch / MARKDOWN).write_text(markdown(report))
        (scratch / PAGE).write_text(page(report, validation_of(report.validation)))
        release = store().put(scratch)
    uri = load_settings().registry_uri
    registry = Registry(uri)
    registered = registry.publish(
        report.name,
        report.order,
        store().reference(release),
        _tags(report, release),
        f"{report.outcome}: {', '.join(step['kind'] for step in report.recipe)}. "
        f"Report: {page_reference(release)}",
    )
    if artifact_name(registered.source) != release.sha256:
        # Somebody else carried out the same order first: theirs is the version, so theirs is
        # the report, whatever was measured here.
        release = store().artifact(registered.source)
        report = report_of(release)
    if report.outcome == "accepted":
        registry.point(report.name, "candidate", registered.version)
    finished = Finished(
        report=report, release=release, version=registered.version, registry=shown(uri)
    )
    write_finished(finished)
    log.info("%s version %s: %s", report.name, registered.version, report.outcome)
    return finished


def is_registered(found: Finished) -> bool:
    """Whether the registry of this process still knows a finished order by this version.

    A result that was registered elsewhere since names that registry, and a number of its own.
    """
    uri = load_settings().registry_uri
    held = Registry(uri).by_order(found.report.order, found.report.name)
    return held is not None and found.registry == shown(uri) and held.version == found.version


def still_published(found: Finished) -> None:
    """Refuse a remembered result the registry or the store no longer holds.

    Raises:
        ArtifactMissing: so that it is published again.
    """
    store().manifest(found.release)
    if not is_registered(found):
        raise ArtifactMissing(f"The registry no longer holds order {found.report.order[:12]}.")


def _tags(report: Report, release: Artifact) -> dict[str, str]:
    tags = {
        "recpress.order": report.order,
        "recpress.release": release.sha256,
        "recpress.report": page_reference(release),
        "recpress.outcome": report.outcome,
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
    """The plan itself, or its digest where a tag cannot hold it (thousands of tables)."""
    lines = {line.module: f"{line.format}, {line.bytes_after} bytes" for line in report.plan.lines}
    text = json.dumps(lines)
    return text if len(text) <= PLAN_CHARACTERS else f"sha256:{digest(report.plan)}"
