"""Which version serves: promote, roll back, fetch. No Prefect: people and servers call these.

The ledger in the object store decides; the registry's alias and the Triton repository, if there is
one, are repaired from it. A change of champion goes in this order, so that a process that dies
anywhere leaves a server on the old champion or on the new one: its files into the repository, the
ledger, the alias, the repository's configuration.
"""

import getpass
import logging
import os
from pathlib import Path

from compressors.contracts import Artifact, TargetKind
from infra.errors import ArtifactMissing, InfraError, PromotionRefused, Refused
from infra.ledger import Entry, Ledger, before
from infra.registry import Registered, Registry
from infra.settings import load_settings
from infra.triton import Served
from tasks import triton
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
        entry = repair(model, reading=True)
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


def repair(model: str, *, expected: bool = False, reading: bool = False) -> Entry | None:
    """Make alias and Triton repository say what the ledger says.

    A model without a ledger is not ours to touch: its alias may be another system's.

    Args:
        model: registered name.
        expected: a change of champion was just written, so there is something to do.
        reading: the caller only wants to know the champion, which a Triton repository that cannot
            be repaired does not keep from anybody. It is logged.
    """
    ledger = Ledger(store(), model)
    entry = ledger.champion()
    while entry is not None:
        if registry().repair(model, entry.version) and not expected:
            log.warning("%s: the registry's champion was repaired from the ledger", model)
        try:
            if _followed(model, entry) and not expected:
                log.warning("%s: the Triton repository was repaired from the ledger", model)
        except (InfraError, Refused) as fault:
            if not reading:
                raise
            log.warning("%s: the Triton repository does not follow: %s", model, fault)
        newest = ledger.champion()
        if newest == entry:
            break
        entry = newest  # somebody promoted meanwhile: alias and server follow the last word
    return entry


def _followed(model: str, entry: Entry) -> bool:
    """Whether the Triton repository, if there is one, had to change to serve this champion."""
    root = triton.repository()
    if root is None:
        return False
    _, report = version_report(model, entry.version)
    return triton.follow(root, model, triton.graphs(entry.version, report)) != ()


def _stage(version: str, report: Report) -> None:
    """Put a version's files where a Triton server will look for them, if one is to follow."""
    root = triton.repository()
    if root is not None:
        triton.stage(root, triton.graphs(version, report))


def promote(model: str, reference: str, reason: str) -> Entry:
    """Make a version the champion.

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
    _stage(registered.version, report)
    entry = ledger.append(
        registered.version, report.order, "promote", whoami(), reason, expected=len(entries)
    )
    repair(model, expected=True)
    return entry


def champion(model: str) -> str | None:
    """The version that is champion, as the ledger says; None where there is none."""
    entry = Ledger(store(), model).champion()
    return None if entry is None else entry.version


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
    if triton.repository() is not None:
        _stage(earlier.version, version_report(model, earlier.version)[1])
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


# --- what a Triton server finds --------------------------------------------------------------


def export(model: str, to: str | None, *, unmeasured: bool = False) -> tuple[triton.Laid, ...]:
    """Lay the champion out in a Triton repository, and look at it afterwards.

    Args:
        model: registered name.
        to: the repository; None for the one of the settings.
        unmeasured: also a plan that was built but never measured.

    Raises:
        PromotionRefused: there is no champion, or nothing of it that Triton can serve.
        SettingRefused: there is no repository, or it cannot be used.
    """
    root = triton.needed(to)
    registered, found = _servable(model, unmeasured=unmeasured)
    triton.stage(root, found)  # compares every byte, which following does not
    triton.follow(root, model, found)
    return triton.look(root, model, registered.version, found)


def laid_out(model: str, to: str | None, *, unmeasured: bool = False) -> tuple[triton.Laid, ...]:
    """What lies in a Triton repository for a model's champion; changes nothing.

    Args and errors as ``export``.
    """
    root = triton.needed(to)
    registered, found = _servable(model, unmeasured=unmeasured)
    return triton.look(root, model, registered.version, found)


def _servable(model: str, *, unmeasured: bool) -> tuple[Registered, tuple[Served, ...]]:
    """The champion and its graphs for Triton. Looking changes nothing: the alias stays as it is."""
    entry = Ledger(store(), model).champion()
    if entry is None:
        raise PromotionRefused(
            f"{model} has no champion in the ledger. Make one: 'recpress registry promote {model}'."
        )
    registered, report = version_report(model, entry.version)
    found = triton.graphs(entry.version, report, unmeasured=unmeasured)
    if not found:
        held = ", ".join(f"{item.target} ({item.verdict.outcome})" for item in report.targets)
        raise PromotionRefused(
            f"Triton can serve nothing of {model} version {entry.version}; it has {held}. Triton "
            "loads accepted ONNX Runtime graphs and TensorRT plans (built but unmeasured ones with "
            "--unmeasured), and never engines of TensorRT-RTX."
        )
    return registered, found
