"""Promote, roll back and fetch versions. No Prefect: commands and servers call these functions.

The ledger in the object store decides which version is the champion. The alias ``champion`` in the
registry and the Triton model repository, if there is one, are copies that are repaired from it.

A change of champion has four actions: copy the version's files to the Triton repository, append to
the ledger, move the alias, and update the repository's configuration. In this order, a server
always has the complete old or new champion, also if the process is killed in between. The change is
then confirmed in the registry; a change without confirmation was interrupted.
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
from infra.registry.ledger import Entry, Ledger, find_rollback_target, list_rolled_back_orders
from infra.registry.mlflow_registry import CHAMPION, ORDER_TAG, RegisteredVersion
from infra.triton.repository import ServedVersion
from tasks.orchestration.documents import PAGE, Report, TargetReport
from tasks.orchestration.workspace import store
from tasks.promotion import triton_repository
from tasks.promotion.acceptance import require_accepted
from tasks.promotion.champion import Version, read_version, version_of_entry, version_of_order
from tasks.promotion.champion import registry as registry

log = logging.getLogger(__name__)


def version_report(model: str, reference: str) -> tuple[RegisteredVersion, Report]:
    """Return a registry version and its report. ``@champion`` is read from the ledger.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.

    Raises:
        PromotionRefused: there is no champion, or the report is of another model or order.
    """
    if reference != "@champion":
        version = read_version(registry().version(model, reference))
        return version.registered, version.report
    entry = repair(model, only_reads=True)
    if entry is None:
        raise PromotionRefused("champion_missing", model=model)
    version = version_of_entry(model, entry)
    return version.registered, version.report


def version_page(model: str, reference: str) -> tuple[RegisteredVersion, bytes]:
    """Return a registry version and the stored HTML page of its report.

    Arguments and errors as in ``version_report``.
    """
    registered, _ = version_report(model, reference)
    return registered, store().file(store().artifact(registered.source), PAGE)


def repair(model: str, *, after_change: bool = False, only_reads: bool = False) -> Entry | None:
    """Update the alias and the Triton repository from the ledger.

    A model without a ledger is not changed: its alias may belong to another system.

    Args:
        model: registered name.
        after_change: whether the ledger was just changed. If so, a repair is expected and not
            logged.
        only_reads: whether the caller only needs the champion. If so, a failed repair of the Triton
            repository is logged; otherwise it raises.

    Returns:
        The ledger's last entry, with the version number that its order has in the registry now;
        None if there is no ledger.

    Raises:
        PromotionRefused: the registry does not have the champion's order, or its report is not
            accepted. The alias is unchanged.
    """
    ledger = Ledger(store(), model)
    entry = ledger.champion()
    while entry is not None:
        version = version_of_entry(model, entry)
        if registry().repair(model, version.number) and not after_change:
            log.warning("%s: the registry's champion was repaired from the ledger", model)
        try:
            if _update_triton(model, version) and not after_change:
                log.warning("%s: the Triton repository was repaired from the ledger", model)
        except (InfraError, Refused) as fault:
            if not only_reads:
                raise
            log.warning("%s: the Triton repository was not updated: %s", model, fault)
        newest = ledger.champion()
        if newest == entry:
            return entry.model_copy(update={"version": version.number})
        entry = newest  # another process has promoted a version in the meantime
    return None


def _update_triton(model: str, version: Version) -> bool:
    """Update the Triton repository, if any, to this champion; return whether it changed."""
    root = triton_repository.repository_root()
    if root is None:
        return False
    graphs = triton_repository.servable_graphs(version.number, version.report)
    return triton_repository.update(root, model, graphs) != ()


def _copy_to_triton(model: str, version: Version) -> None:
    """Copy a version's files into the Triton repository, if there is one."""
    root = triton_repository.repository_root()
    if root is None:
        return
    try:
        # Folders have version numbers. In a rebuilt registry, the folder of the current champion
        # may have the number of this version, so the champion is first moved to its new number.
        repair(model, only_reads=True)
    except PromotionRefused as fault:
        log.warning("%s: the current champion was not repaired: %s", model, fault)
    graphs = triton_repository.servable_graphs(version.number, version.report)
    triton_repository.copy_files(root, graphs)


class ChampionChange(Frozen):
    """The champion's ledger entry after a command; ``is_new`` if the command appended it."""

    entry: Entry
    is_new: bool


def promote(model: str, reference: str, reason: str) -> Entry:
    """Call ``apply_promotion`` and return only the entry."""
    return apply_promotion(model, reference, reason).entry


def rollback(model: str, reason: str, *, from_version: str | None = None) -> Entry:
    """Call ``apply_rollback`` and return only the entry."""
    return apply_rollback(model, reason, from_version=from_version).entry


def apply_promotion(model: str, reference: str, reason: str) -> ChampionChange:
    """Make a version the champion. If it already is, complete an interrupted earlier command.

    Args:
        model: registered name.
        reference: ``3``, ``@candidate`` or ``@champion``.
        reason: a text for the ledger.

    Raises:
        PromotionRefused: the outcome of the version's report is not ``accepted``, or the report
            contradicts it.
        AlreadyThere: another command has made another version the champion.
    """
    entries = Ledger(store(), model).entries()
    registered, report = version_report(model, reference)
    return _promote(model, Version(registered, report), reason, entries)


def champion(model: str) -> Entry | None:
    """Return the ledger entry of the current champion; None if there is no champion."""
    return Ledger(store(), model).champion()


def promote_order(model: str, order: str, reason: str) -> Entry:
    """Make the version of an order the champion.

    Args:
        model: registered name.
        order: digest of the order.
        reason: a text for the ledger.

    Raises:
        PromotionRefused: the version was not accepted, or the registry does not have the order.
        AlreadyThere: another command has made another version the champion.
    """
    entries = Ledger(store(), model).entries()
    return _promote(model, version_of_order(model, order), reason, entries).entry


def _promote(
    model: str, version: Version, reason: str, entries: tuple[Entry, ...]
) -> ChampionChange:
    """Make a version the champion; ``entries`` is the ledger when the command began."""
    order = version.report.order
    require_accepted(model, version.number, version.report)
    is_new = not entries or entries[-1].order != order
    if is_new:
        _copy_to_triton(model, version)
        ledger = Ledger(store(), model)
        try:
            # ``expected``: the number of entries; raises if the ledger has more.
            ledger.append(version.number, order, "promote", whoami(), reason, expected=len(entries))
        except AlreadyThere:
            champion = ledger.champion()
            if champion is None or champion.order != order:
                raise
            is_new = False  # another command has promoted the same order
    return _complete(model, is_new=is_new)


def apply_rollback(
    model: str,
    reason: str,
    *,
    from_version: str | None = None,
    command_start: datetime | None = None,
) -> ChampionChange:
    """Make the version before the current champion the champion again.

    If the last ledger entry is a rollback that was interrupted, or that another command appended
    after this one began, only that rollback is completed, so that a repeated command does not go
    back two versions.

    Args:
        model: registered name.
        reason: a text for the ledger.
        from_version: the version to roll back from; by default the current champion. If it has
            already been rolled back, nothing is rolled back.
        command_start: start time of the command; by default now.

    Raises:
        PromotionRefused: there is no version before it, or ``from_version`` is not the champion.
        AlreadyThere: another command has promoted a version.
    """
    command_start = command_start or datetime.now(UTC)
    ledger = Ledger(store(), model)
    entries = ledger.entries()
    from_order = None
    if from_version is not None:
        from_order = registry().version(model, from_version).tags.get(ORDER_TAG)
    if _is_rolled_back(model, entries, from_version, from_order, command_start):
        return _complete(model, is_new=False)
    earlier = find_rollback_target(entries)
    if earlier is None:
        raise PromotionRefused("earlier_champion_missing", model=model, entries=len(entries))
    version = version_of_entry(model, earlier)
    _copy_to_triton(model, version)
    try:
        ledger.append(
            version.number, earlier.order, "rollback", whoami(), reason, expected=len(entries)
        )
    except AlreadyThere:
        later = ledger.entries()[len(entries) :]
        if any(entry.action != "rollback" for entry in later):
            raise
        return _complete(model, is_new=False)  # another command has rolled back
    return _complete(model, is_new=True)


def _is_rolled_back(
    model: str,
    entries: tuple[Entry, ...],
    from_version: str | None,
    from_order: str | None,
    command_start: datetime,
) -> bool:
    """Return whether the ledger already has the rollback of a command.

    Args:
        model: registered name.
        entries: the entries of the ledger.
        from_version: the version to roll back from; None for the current champion.
        from_order: digest of that version's order.
        command_start: start time of the command.

    Raises:
        PromotionRefused: ``from_version`` is not the champion and has not been rolled back.
    """
    last = entries[-1] if entries else None
    if from_version is not None:
        if last is not None and last.order == from_order:
            return False
        if from_order in list_rolled_back_orders(entries):
            return True
        current = "none" if last is None else f"version {last.version}"
        raise PromotionRefused("other_champion", model=model, expected=from_version, got=current)
    if last is None or last.action != "rollback":
        return False
    if last.digest is None:  # an earlier version of recpress wrote it, and moved the alias last
        return CHAMPION not in version_of_entry(model, last).registered.aliases
    # A completed change is confirmed in the registry (``_complete``), an interrupted one is not.
    return (
        datetime.fromisoformat(last.at) > command_start
        or registry().read_confirmation(model) != last.digest
    )


def _complete(model: str, *, is_new: bool) -> ChampionChange:
    """Update the alias and the Triton repository, then record that the change is complete."""
    entry = repair(model, after_change=True)
    if entry is None:
        raise ConcurrentChange("ledger_emptied", model=model)
    if entry.digest is not None:
        registry().confirm(model, entry.digest)
    return ChampionChange(entry=entry, is_new=is_new)


def champion_graph(model: str, target: str) -> Artifact | None:
    """Return the champion's graphs or engines for a target; None if there is no champion.

    Raises:
        ArtifactMissing: the champion was not built for this target.
    """
    entry = Ledger(store(), model).champion()
    if entry is None:
        return None
    version = version_of_entry(model, entry)
    return _require_target(version.report, target, model, version.number).artifact


def fetch(
    model: str,
    reference: str,
    target: str,
    into: Path,
    *,
    unmeasured: bool = False,
    unaccepted: bool = False,
) -> tuple[RegisteredVersion, TargetReport]:
    """Copy the files of one target of a version to a folder, and verify their hashes.

    Args:
        model: registered name.
        reference: ``3``, ``@champion`` or ``@candidate``.
        target: name of the target.
        into: the folder; must not exist, or be empty.
        unmeasured: allow a target that was built but never measured.
        unaccepted: allow a target that was rejected or is undecided.

    Raises:
        PromotionRefused: the target's verdict does not allow it.
        ArtifactMissing: there is no such version or target.
        ArtifactDamaged: stored bytes are damaged.
    """
    registered, report = version_report(model, reference)
    target_report = _require_target(report, target, model, registered.version)
    outcome = target_report.verdict.outcome
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
            reason=target_report.verdict.reason,
        )
    store().get(target_report.artifact, into)
    return registered, target_report


def whoami() -> str:
    """Return the name of the current user for the ledger."""
    return os.environ.get("RECPRESS_USER") or getpass.getuser()


def _require_target(report: Report, target: str, model: str, version: str) -> TargetReport:
    """Return the part of a report for a target; raises ``ArtifactMissing`` if there is none."""
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
        to: root of the repository; None for the repository in the settings.
        unmeasured: also export engines that were built but never measured.

    Raises:
        PromotionRefused: there is no champion, or it has no graph that Triton can serve.
        SettingRefused: there is no repository, or it cannot be used.
    """
    root = triton_repository.require_repository(to)
    registered, graphs = _find_champion_graphs(model, unmeasured=unmeasured)
    triton_repository.copy_files(root, graphs)  # also replaces files with different bytes
    triton_repository.update(root, model, graphs)
    return triton_repository.compare_models(root, model, registered.version, graphs)


def triton_contents(
    model: str, to: str | None, *, unmeasured: bool = False
) -> tuple[triton_repository.TritonModel, ...]:
    """Compare a Triton repository with a model's champion, without changing it.

    Arguments and errors as in ``export``.
    """
    root = triton_repository.require_repository(to)
    registered, graphs = _find_champion_graphs(model, unmeasured=unmeasured)
    return triton_repository.compare_models(root, model, registered.version, graphs)


def _find_champion_graphs(
    model: str, *, unmeasured: bool
) -> tuple[RegisteredVersion, tuple[ServedVersion, ...]]:
    """Return the champion and its graphs for Triton, without repairing the alias.

    Raises:
        PromotionRefused: there is no champion, or it has no graph that Triton can serve.
    """
    entry = Ledger(store(), model).champion()
    if entry is None:
        raise PromotionRefused("champion_to_serve_missing", model=model)
    version = version_of_entry(model, entry)
    registered, report = version.registered, version.report
    graphs = triton_repository.servable_graphs(version.number, report, unmeasured=unmeasured)
    if not graphs:
        targets = tuple(f"{item.target} ({item.verdict.outcome})" for item in report.targets)
        raise PromotionRefused(
            "not_servable_by_triton", model=model, version=version.number, targets=targets
        )
    return registered, graphs
