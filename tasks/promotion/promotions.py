"""Promote, roll back and fetch versions. No Prefect: commands and servers call these.

The ledger in the object store decides; the registry's alias and the Triton repository, if there is
one, are repaired from it. A change of champion has a fixed order, so that a server has the old
champion or the new one wherever a process dies: files into the repository, ledger, alias, the
repository's configuration.
"""

import getpass
import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from compressors.contracts import Artifact, Frozen
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
    """Return a registry version and the report it points to.

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
    """Return a registry version and the page of its report, as published.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
    """
    registered, _ = version_report(model, reference)
    return registered, store().file(store().artifact(registered.source), PAGE)


def repair(model: str, *, expected: bool = False, reading: bool = False) -> Entry | None:
    """Update the alias and the Triton repository from the ledger.

    A model without a ledger is not changed: its alias may belong to another system.

    Args:
        model: registered name.
        expected: whether a change of champion was just written, so that a difference is expected.
        reading: whether the caller only needs the champion. If so, a failed repair of the Triton
            repository is logged; otherwise it raises.

    Returns:
        The ledger's last entry, with the number its order has in the registry; None if there is
        no ledger.

    Raises:
        PromotionRefused: the registry does not have the champion's order, or its report is not
            accepted. The alias is unchanged.
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
        entry = newest  # another process has promoted: alias and server follow its entry
    return None


def _followed(model: str, version: Version) -> bool:
    """Update the Triton repository, if any, to this champion; returns whether it changed."""
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
    """Copy a version's files into the Triton repository, if there is one."""
    root = triton_repository.repository()
    if root is None:
        return
    try:
        # In a registry with other version numbers, the folder that the server reads now may have
        # this version's number: first move the champion to its current number.
        repair(model, reading=True)
    except PromotionRefused as fault:
        log.warning("%s: the present champion stays as it is served: %s", model, fault)
    triton_repository.stage(root, triton_repository.graphs(version.number, version.report))


class Change(Frozen):
    """The resulting ledger entry of a command; ``is_new`` if this command appended it."""

    entry: Entry
    is_new: bool


def promote(model: str, reference: str, reason: str) -> Entry:
    """Call ``apply_promotion`` and return only the entry."""
    return apply_promotion(model, reference, reason).entry


def rollback(model: str, reason: str, *, leaving: str | None = None) -> Entry:
    """Call ``apply_rollback`` and return only the entry."""
    return apply_rollback(model, reason, leaving=leaving).entry


def apply_promotion(model: str, reference: str, reason: str) -> Change:
    """Make a version the champion. If it already is, complete an interrupted earlier command.

    Args:
        model: registered name.
        reference: ``3``, ``@candidate`` or ``@champion``.
        reason: written into the ledger.

    Raises:
        PromotionRefused: its outcome is not accepted, or its report does not support it.
        AlreadyThere: another command has made another version champion.
    """
    entries = Ledger(store(), model).entries()
    registered, report = version_report(model, reference)
    return _promote(model, Version(registered, report), reason, entries)


def champion(model: str) -> Entry | None:
    """Return the entry of the current champion; None if there has never been one."""
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
            is_new = False  # another command has promoted the same order
    return _completed(model, is_new=is_new)


def apply_rollback(
    model: str, reason: str, *, leaving: str | None = None, began: datetime | None = None
) -> Change:
    """Make the version before the current champion the champion again.

    A repeated command after an interrupted run completes that run and does not roll back a second
    time: the last entry is an unconfirmed rollback. The same holds for a rollback by another
    command after this one began.

    Args:
        model: registered name.
        reason: written into the ledger.
        leaving: the version to roll back from. If it has already been rolled back, nothing else is
            rolled back. Default: the current champion.
        began: start time of the command; by default now.

    Raises:
        PromotionRefused: there is no version before it, or ``leaving`` is not the champion.
        AlreadyThere: another command has promoted a version.
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
        return _completed(model, is_new=False)  # another command has rolled back
    return _completed(model, is_new=True)


def _is_rolled_back(
    model: str,
    entries: tuple[Entry, ...],
    leaving: str | None,
    left: str | None,
    began: datetime,
) -> bool:
    """Return whether the ledger already has the rollback of a command."""
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
    """Update the alias and the Triton repository, then record the confirmation."""
    entry = repair(model, expected=True)
    if entry is None:
        raise ConcurrentChange("ledger_emptied", model=model)
    if entry.digest is not None:
        registry().confirm(model, entry.digest)
    return Change(entry=entry, is_new=is_new)


def champion_graph(model: str, target: str) -> Artifact | None:
    """Return what a target serves of the current champion; None without a champion.

    Raises:
        ArtifactMissing: the champion was not built for this target.
    """
    entry = Ledger(store(), model).champion()
    if entry is None:
        return None
    version = version_of_entry(model, entry)
    return _target(version.report, target, model, version.number).artifact


def fetch(
    model: str,
    reference: str,
    target: str,
    into: Path,
    *,
    unmeasured: bool = False,
    unaccepted: bool = False,
) -> tuple[Registered, TargetReport]:
    """Copy one target of a version to a folder, every chunk verified.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
        target: the target of the files.
        into: must not exist, or be an empty folder.
        unmeasured: allow a target that was built but never measured.
        unaccepted: allow a target that was rejected or is undecided.

    Raises:
        PromotionRefused: the target's verdict does not allow it.
        ArtifactMissing: there is no such version or target.
        ArtifactDamaged: stored bytes are damaged.
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
    """Return the name of the current user for the ledger."""
    return os.environ.get("RECPRESS_USER") or getpass.getuser()


def _target(report: Report, target: str, model: str, version: str) -> TargetReport:
    for item in report.targets:
        if item.target == target:
            return item
    targets = tuple(item.target for item in report.targets) or ("none",)
    raise ArtifactMissing(
        "target_missing", model=model, version=version, target=target, targets=targets
    )


# --- Triton repository -----------------------------------------------------------------------


def export(
    model: str, to: str | None, *, unmeasured: bool = False
) -> tuple[triton_repository.TritonModel, ...]:
    """Export the champion to a Triton repository, and return the repository's state.

    Args:
        model: registered name.
        to: the repository; None for the one of the settings.
        unmeasured: also export a plan that was built but never measured.

    Raises:
        PromotionRefused: there is no champion, or it has no graph that Triton can serve.
        SettingRefused: there is no repository, or it cannot be used.
    """
    root = triton_repository.needed(to)
    registered, found = _servable(model, unmeasured=unmeasured)
    triton_repository.stage(root, found)  # compares every byte, unlike the update
    triton_repository.follow(root, model, found)
    return triton_repository.compare(root, model, registered.version, found)


def triton_contents(
    model: str, to: str | None, *, unmeasured: bool = False
) -> tuple[triton_repository.TritonModel, ...]:
    """Return the state of a Triton repository for a model's champion, without changes.

    Arguments and errors as in ``export``.
    """
    root = triton_repository.needed(to)
    registered, found = _servable(model, unmeasured=unmeasured)
    return triton_repository.compare(root, model, registered.version, found)


def _servable(model: str, *, unmeasured: bool) -> tuple[Registered, tuple[ServedVersion, ...]]:
    """Return the champion and its graphs for Triton, without changing the alias."""
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
