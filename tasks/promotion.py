"""Which version serves: promote, roll back, fetch. No Prefect: people and servers call these.

The ledger in the object store decides; the registry's alias is repaired from it.
"""

import getpass
import logging
import os
from pathlib import Path

from compressors.contracts import Artifact, TargetKind
from infra.errors import ArtifactMissing, PromotionRefused
from infra.ledger import Entry, Ledger, before
from infra.registry import Registered, Registry
from infra.settings import load_settings
from tasks.documents import PAGE, Report, TargetReport, report_of
from tasks.stored import store

log = logging.getLogger(__name__)


def registry() -> Registry:
    """The registry of this process's settings."""
    return Registry(load_settings().registry_uri)


def listed(model: str | None) -> tuple[Registered, ...]:
    """Our versions of one model or of all; what others registered is left out."""
    held = registry()
    names = [model] if model else held.models()
    found = [version for name in names for version in held.versions(name)]
    return tuple(version for version in found if "recpress.order" in version.tags)


def version_report(model: str, reference: str) -> tuple[Registered, Report]:
    """A registry version and the report it points to.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
    """
    if reference == "@champion":
        entry = repair(model)
        if entry is None:
            raise PromotionRefused(
                f"{model} has no champion in the ledger, so there is no @champion. Make one: "
                f"'recpress registry promote {model}', or name a version."
            )
        reference = entry.version
    registered = registry().version(model, reference)
    report = report_of(store().artifact(registered.source))
    if (report.name, report.order) != (model, registered.tags.get("recpress.order")):
        raise PromotionRefused(
            f"{model} version {registered.version} points to the release of {report.name}, order "
            f"{report.order[:12]}: it was not registered by recpress as it stands."
        )
    return registered, report


def version_page(model: str, reference: str) -> tuple[Registered, bytes]:
    """A registry version and the page of its report, as it was published.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
    """
    registered, _ = version_report(model, reference)
    return registered, store().file(store().artifact(registered.source), PAGE)


def repair(model: str, *, expected: bool = False) -> Entry | None:
    """Make the registry's alias say what the ledger says; log it unless it was to be expected.

    A model without a ledger is not ours to touch: its alias may be another system's.
    """
    ledger = Ledger(store(), model)
    entry = ledger.champion()
    while entry is not None:
        if registry().repair(model, entry.version) and not expected:
            log.warning("%s: the registry's champion was repaired from the ledger", model)
        newest = ledger.champion()
        if newest == entry:
            break
        entry = newest  # somebody promoted meanwhile: the alias follows the last word
    return entry


def promote(model: str, reference: str, reason: str) -> Entry:
    """Make a version the champion: first the ledger, then the alias.

    Raises:
        PromotionRefused: its outcome is not accepted.
        AlreadyThere: somebody else changed the champion meanwhile.
    """
    ledger = Ledger(store(), model)
    entries = ledger.entries()
    registered, report = version_report(model, reference)
    if report.outcome != "accepted":
        reasons = "; ".join(t.verdict.reason for t in report.targets)
        raise PromotionRefused(
            f"{model} version {registered.version} is {report.outcome} ({reasons}). Only an "
            f"accepted version can become champion."
        )
    if entries and entries[-1].version == registered.version:
        repair(model)
        return entries[-1]
    entry = ledger.append(
        registered.version, report.order, "promote", whoami(), reason, expected=len(entries)
    )
    repair(model, expected=True)
    return entry


def rollback(model: str, reason: str) -> Entry:
    """Make the version before the current champion the champion again.

    Raises:
        PromotionRefused: there is none before it.
    """
    ledger = Ledger(store(), model)
    entries = ledger.entries()
    earlier = before(entries)
    if earlier is None:
        raise PromotionRefused(
            f"{model} has no champion before the current one to go back to; "
            f"its ledger has {len(entries)} line(s)."
        )
    entry = ledger.append(
        earlier.version, earlier.order, "rollback", whoami(), reason, expected=len(entries)
    )
    repair(model, expected=True)
    return entry


def champion_graph(model: str) -> Artifact | None:
    """The ONNX Runtime graph of the current champion, or None."""
    entry = Ledger(store(), model).champion()
    if entry is None:
        return None
    _, report = version_report(model, entry.version)
    return _target(report, "onnxruntime", model, entry.version).artifact


def fetch(
    model: str,
    reference: str,
    target: TargetKind,
    into: Path,
    *,
    unmeasured: bool = False,
    unaccepted: bool = False,
) -> tuple[Registered, TargetReport]:
    """Copy one target of a version to a folder, every chunk verified.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
        target: which target's files.
        into: a folder that does not exist yet, or an empty one.
        unmeasured: take a target that was built but never measured.
        unaccepted: take a target that was rejected or is undecided.

    Raises:
        PromotionRefused: the target's verdict does not allow it.
        ArtifactMissing: there is no such version or target.
        ArtifactDamaged: stored bytes are not what was written.
    """
    registered, report = version_report(model, reference)
    found = _target(report, target, model, registered.version)
    outcome = found.verdict.outcome
    where = f"{target} of {model} version {registered.version} is {outcome}"
    if outcome == "built-unmeasured" and not unmeasured:
        raise PromotionRefused(
            f"{where}: it was built and audited on a machine that could not run it. Measure it "
            f"where it will serve; to take it as it is, add --unmeasured."
        )
    if outcome in {"rejected", "undecided"} and not unaccepted:
        raise PromotionRefused(
            f"{where}: {found.verdict.reason}. To take it all the same, add --unaccepted."
        )
    store().get(found.artifact, into)
    return registered, found


def whoami() -> str:
    """Who is written into the ledger."""
    return os.environ.get("RECPRESS_USER") or getpass.getuser()


def _target(report: Report, target: TargetKind, model: str, version: str) -> TargetReport:
    for item in report.targets:
        if item.target == target:
            return item
    held = ", ".join(item.target for item in report.targets) or "none"
    raise ArtifactMissing(f"{model} version {version} has no {target}; it has {held}.")
