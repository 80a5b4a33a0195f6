"""Which version serves: promote, roll back, fetch. No Prefect: people and servers call these.

The ledger in the object store decides; the registry's alias and the Triton repository, if there is
one, are repaired from it. A change of champion goes in this order, so that a process that dies
anywhere leaves a server on the old champion or on the new one: its files into the repository, the
ledger, the alias, the repository's configuration.
"""

import getpass
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from compressors.contracts import Artifact, Frozen, TargetKind
from infra.errors import (
    AlreadyThere,
    ArtifactMissing,
    ConcurrentChange,
    InfraError,
    PromotionRefused,
    Refused,
)
from infra.registry.ledger import Entry, Ledger, before, undone
from infra.registry.mlflow_registry import CHAMPION, ORDER_TAG, Registered
from infra.triton.repository import ServedVersion
from tasks.orchestration.documents import PAGE, Report, TargetReport
from tasks.orchestration.workspace import store
from tasks.promotion import triton_repository
from tasks.promotion.acceptance import require_accepted
from tasks.promotion.champion import Version, version_of, version_of_entry, version_of_order
from tasks.promotion.champion import registry as registry

log = logging.getLogger(__name__)


def version_report(model: str, reference: str) -> tuple[Registered, Report]:
    """A registry version and the report it points to.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
    """
    if reference != "@champion":
        version = version_of(registry().version(model, reference))
        return version.registered, version.report
    entry = repair(model, reading=True)
    if entry is None:
        raise PromotionRefused("champion_missing", model=model)
    version = version_of_entry(model, entry)
    return version.registered, version.report


def version_page(model: str, reference: str) -> tuple[Registered, bytes]:
    """A registry version and the page of its report, as it was published.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
    """
    registered, _ = version_report(model, reference)
    return registered, store().file(store().artifact(registered.source), PAGE)


def repair(model: str, *, expected: bool = False, reading: bool = False) -> Entry | None:
    """Make the alias and the Triton repository follow the ledger.

    A model without a ledger is left alone: its alias may belong to another system.

    Args:
        model: registered name.
        expected: a change of champion was just written, so a difference is no surprise.
        reading: the caller only needs the champion. A Triton repository that cannot be repaired
            is logged then, and raises otherwise.

    Returns:
        The ledger's last entry, with the number its order has in the registry; None if there is
        no ledger.

    Raises:
        PromotionRefused: the registry does not have the champion's order, or its report is not
            accepted. The alias stays as it is.
    """
    ledger = Ledger(store(), model)
    entry = ledger.champion()
    while entry is not None:
        version = version_of_entry(model, entry)
        if registry().repair(model, version.number) and not expected:
            log.warning("%s: the registry's champion was repaired from the ledger", model)
        try:
            if _followed(model, version) and not expected:
                log.warning("%s: the Triton repository was repaired from the ledger", model)
        except (InfraError, Refused) as fault:
            if not reading:
                raise
            log.warning("%s: the Triton repository does not follow: %s", model, fault)
        newest = ledger.champion()
        if newest == entry:
            return entry.model_copy(update={"version": version.number})
        entry = newest  # another process promoted meanwhile: alias and server follow its entry
    return None


def _followed(model: str, version: Version) -> bool:
    """Whether the Triton repository, if there is one, had to change to serve this champion."""
    root = triton_repository.repository()
    if root is None:
        return False
    return (
        triton_repository.follow(
            root, model, triton_repository.graphs(version.number, version.report)
        )
        != ()
    )


def _stage(model: str, version: Version) -> None:
    """Copy a version's files to where a Triton server finds them, if one is to follow."""
    root = triton_repository.repository()
    if root is None:
        return
    try:
        # In a registry with other version numbers, the folder the server reads now may have
        # the number of this version: the champion has to move to its present number first.
        repair(model, reading=True)
    except PromotionRefused as fault:
        log.warning("%s: the present champion stays as it is served: %s", model, fault)
    triton_repository.stage(root, triton_repository.graphs(version.number, version.report))


class Change(Frozen):
    """The ledger entry a command resulted in; ``is_new`` if this command appended it."""

    entry: Entry
    is_new: bool


def promote(model: str, reference: str, reason: str) -> Entry:
    """As ``apply_promotion``; returns the entry only."""
    return apply_promotion(model, reference, reason).entry


def rollback(model: str, reason: str, *, leaving: str | None = None) -> Entry:
    """As ``apply_rollback``; returns the entry only."""
    return apply_rollback(model, reason, leaving=leaving).entry


def apply_promotion(model: str, reference: str, reason: str) -> Change:
    """Make a version the champion. If it is already, complete what an earlier command left undone.

    Args:
        model: registered name.
        reference: ``3``, ``@candidate`` or ``@champion``.
        reason: written into the ledger.

    Raises:
        PromotionRefused: its outcome is not accepted, or its report does not support it.
        AlreadyThere: another command made another version champion meanwhile.
    """
    entries = Ledger(store(), model).entries()
    registered, report = version_report(model, reference)
    return _promote(model, Version(registered, report), reason, entries)


def champion(model: str) -> Entry | None:
    """The entry that made the current champion; None if there never was one."""
    return Ledger(store(), model).champion()


def promote_order(model: str, order: str, reason: str) -> Entry:
    """Make the version that has this order the champion.

    Raises:
        PromotionRefused, AlreadyThere: as ``apply_promotion``; also the registry does not have
            the order.
    """
    entries = Ledger(store(), model).entries()
    return _promote(model, version_of_order(model, order), reason, entries).entry


def _promote(model: str, version: Version, reason: str, entries: tuple[Entry, ...]) -> Change:
    order = version.report.order
    require_accepted(model, version.number, version.report)
    is_new = not entries or entries[-1].order != order
    if is_new:
        _stage(model, version)
        ledger = Ledger(store(), model)
        try:
            ledger.append(version.number, order, "promote", whoami(), reason, expected=len(entries))
        except AlreadyThere:
            champion = ledger.champion()
            if champion is None or champion.order != order:
                raise
            is_new = False  # another command promoted the same order
    return _completed(model, is_new=is_new)


def apply_rollback(
    model: str, reason: str, *, leaving: str | None = None, began: datetime | None = None
) -> Change:
    """Make the version before the current champion the champion again.

    A command that is repeated because its first run was interrupted completes that run and does
    not go back a second time: the last entry is a rollback that was not confirmed. The same holds
    for a rollback that another command decided after this one began.

    Args:
        model: registered name.
        reason: written into the ledger.
        leaving: the version to roll back from. If it is not champion because it was rolled back
            already, nothing more is rolled back. Without it: the current champion.
        began: when the command began; now, if not given.

    Raises:
        PromotionRefused: there is no version before it, or ``leaving`` is not the champion.
        AlreadyThere: another command promoted a version meanwhile.
    """
    began = began or datetime.now(UTC)
    ledger = Ledger(store(), model)
    entries = ledger.entries()
    left = None if leaving is None else registry().version(model, leaving).tags.get(ORDER_TAG)
    if _is_rolled_back(model, entries, leaving, left, began):
        return _completed(model, is_new=False)
    earlier = before(entries)
    if earlier is None:
        raise PromotionRefused("earlier_champion_missing", model=model, entries=len(entries))
    version = version_of_entry(model, earlier)
    _stage(model, version)
    try:
        ledger.append(
            version.number, earlier.order, "rollback", whoami(), reason, expected=len(entries)
        )
    except AlreadyThere:
        later = ledger.entries()[len(entries) :]
        if any(entry.action != "rollback" for entry in later):
            raise
        return _completed(model, is_new=False)  # another command rolled back meanwhile
    return _completed(model, is_new=True)


def _is_rolled_back(
    model: str,
    entries: tuple[Entry, ...],
    leaving: str | None,
    left: str | None,
    began: datetime,
) -> bool:
    """Whether the rollback a command means is in the ledger already."""
    last = entries[-1] if entries else None
    if leaving is not None:
        if last is not None and last.order == left:
            return False
        if left in undone(entries):
            return True
        current = "none" if last is None else f"version {last.version}"
        raise PromotionRefused("other_champion", model=model, expected=leaving, got=current)
    if last is None or last.action != "rollback":
        return False
    if last.digest is None:  # written by a version that did not confirm: the alias moved last
        return CHAMPION not in version_of_entry(model, last).registered.aliases
    return datetime.fromisoformat(last.at) > began or registry().confirmed(model) != last.digest


def _completed(model: str, *, is_new: bool) -> Change:
    """Make the alias and the Triton repository follow, then confirm that they do."""
    entry = repair(model, expected=True)
    if entry is None:
        raise ConcurrentChange("ledger_emptied", model=model)
    if entry.digest is not None:
        registry().confirm(model, entry.digest)
    return Change(entry=entry, is_new=is_new)


def champion_graph(model: str) -> Artifact | None:
    """The ONNX Runtime graph of the current champion, or None."""
    entry = Ledger(store(), model).champion()
    if entry is None:
        return None
    version = version_of_entry(model, entry)
    return _target(version.report, "onnxruntime", model, version.number).artifact


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
    if outcome == "built-unmeasured" and not unmeasured:
        raise PromotionRefused(
            "target_unmeasured", target=target, model=model, version=registered.version
        )
    if outcome in {"rejected", "undecided"} and not unaccepted:
        raise PromotionRefused(
            "target_not_accepted",
            target=target,
            model=model,
            version=registered.version,
            outcome=outcome,
            reason=found.verdict.reason,
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
    targets = tuple(item.target for item in report.targets) or ("none",)
    raise ArtifactMissing(
        "target_missing", model=model, version=version, target=target, targets=targets
    )


# --- what a Triton server finds --------------------------------------------------------------


def export(
    model: str, to: str | None, *, unmeasured: bool = False
) -> tuple[triton_repository.TritonModel, ...]:
    """Lay the champion out in a Triton repository, and look at it afterwards.

    Args:
        model: registered name.
        to: the repository; None for the one of the settings.
        unmeasured: also a plan that was built but never measured.

    Raises:
        PromotionRefused: there is no champion, or nothing of it that Triton can serve.
        SettingRefused: there is no repository, or it cannot be used.
    """
    root = triton_repository.needed(to)
    registered, found = _servable(model, unmeasured=unmeasured)
    triton_repository.stage(root, found)  # compares every byte, which following does not
    triton_repository.follow(root, model, found)
    return triton_repository.compare(root, model, registered.version, found)


def triton_contents(
    model: str, to: str | None, *, unmeasured: bool = False
) -> tuple[triton_repository.TritonModel, ...]:
    """What lies in a Triton repository for a model's champion; changes nothing.

    Args and errors as ``export``.
    """
    root = triton_repository.needed(to)
    registered, found = _servable(model, unmeasured=unmeasured)
    return triton_repository.compare(root, model, registered.version, found)


def _servable(model: str, *, unmeasured: bool) -> tuple[Registered, tuple[ServedVersion, ...]]:
    """The champion and its graphs for Triton. Looking changes nothing: the alias stays as it is."""
    entry = Ledger(store(), model).champion()
    if entry is None:
        raise PromotionRefused("champion_to_serve_missing", model=model)
    version = version_of_entry(model, entry)
    registered, report = version.registered, version.report
    found = triton_repository.graphs(version.number, report, unmeasured=unmeasured)
    if not found:
        targets = tuple(f"{item.target} ({item.verdict.outcome})" for item in report.targets)
        raise PromotionRefused(
            "not_servable_by_triton", model=model, version=version.number, targets=targets
        )
    return registered, found
