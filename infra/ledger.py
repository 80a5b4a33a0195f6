"""The promotion ledger: append-only entries in the object store that decide the champion.

A registry's alias has no compare-and-swap, so two people who promote at once would overwrite
each other unseen. Here every entry is a key, ``ledger/<model>/<sequence>.json``, written by a
conditional create: of two writers of one number exactly one wins. The registry's alias follows
(``Registry.repair``).

An entry names the champion by the digest of its order. The version is a label: another registry,
or one that was restored, may number its versions differently.
"""

from datetime import UTC, datetime
from functools import partial
from typing import Literal

from pydantic import Field

from compressors.contracts import Frozen, digest
from infra.bundle_json import short
from infra.errors import AlreadyThere, ArtifactDamaged, ArtifactMissing, InfraError, Refused
from infra.json_limits import validated
from infra.store import Store
from infra.store_manifest import plain_path

Action = Literal["promote", "rollback"]

ATTEMPTS = 100  # lost races in a row before we say that the ledger is too busy


SEALED = ("sequence", "model", "version", "order", "action", "previous", "at", "by", "reason")
"""The fields an entry's digest covers."""


class Entry(Frozen):
    """One change of champion. ``previous`` is the version it replaced."""

    sequence: int = Field(ge=1)
    model: str
    version: str = Field(min_length=1, description="The order's number in the registry then.")
    order: str = Field(description="The order's digest: this is what became champion.")
    action: Action
    previous: str | None
    at: str = Field(description="UTC, ISO 8601.")
    by: str
    reason: str
    digest: str | None = Field(
        None,
        description="SHA-256 over this entry and the one before it. Entries of versions of "
        "recpress that wrote none have none.",
    )

    def sealed(self, previous: "Entry | None") -> "Entry":
        """The same entry with the digest it has after ``previous``."""
        fields = self.model_dump(mode="json", include=set(SEALED))
        after = None if previous is None else previous.digest or previous.sealed(None).digest
        return self.model_copy(update={"digest": digest({**fields, "after": after})})


class Ledger:
    """The entries of one model.

    Args:
        store: where they lie.
        model: the model's name; one part of a path.

    Raises:
        Refused: ``model`` cannot be part of a key.
    """

    def __init__(self, store: Store, model: str) -> None:
        try:
            plain_path(model)
        except ValueError as fault:
            raise Refused(f"A model's name is part of a path: {fault}.") from fault
        if "/" in model or ":" in model:
            raise Refused(f"A model's name has neither '/' nor ':'; found {short(model)}.")
        self._store = store
        self._model = model
        self._home = f"ledger/{model}/"

    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first.

        Raises:
            ArtifactDamaged: one is missing between others, cannot be read, or does not continue
                the one before it.
        """
        last = 0
        for key in self._store.keys(self._home):
            number = key.removeprefix(self._home).removesuffix(".json")
            if key != self._key_of(number):
                raise ArtifactDamaged(f"{self._store.root}/{key} does not belong in a ledger.")
            last = max(last, int(number))
        found: list[Entry] = []
        # By number and not by the listing: a listing of a folder is no snapshot, so it may show
        # entry 6 without the 5 that was written before it.
        for sequence in range(1, last + 1):
            before_it = tuple(found)
            found.append(self._store.checked(partial(self._next, before_it, sequence)))
        return tuple(found)

    def champion(self) -> Entry | None:
        """The entry that made the present champion, or None if there never was one."""
        entries = self.entries()
        return entries[-1] if entries else None

    def append(
        self,
        version: str,
        order: str,
        action: Action,
        by: str,
        reason: str,
        expected: int | None = None,
    ) -> Entry:
        """Make ``version`` champion.

        Args:
            version: the order's number in the registry.
            order: the order's digest. For a rollback: the one ``before`` names.
            action: whether this is a new choice or the way back.
            by: who decided.
            reason: why.
            expected: the last sequence the caller saw, 0 for none. If somebody appended
                since, nothing is written. None: append after whatever is there.

        Raises:
            AlreadyThere: the ledger moved on since ``expected``; it says who won.
            Refused: a rollback to another order than ``before`` names.
            ArtifactDamaged: as ``entries``.
        """
        for _ in range(ATTEMPTS):
            entries = self.entries()
            if expected is not None and len(entries) != expected:
                raise AlreadyThere(self._moved_on(entries, expected))
            if action == "rollback":
                self._check_rollback(entries, version, order)
            previous = entries[-1] if entries else None
            entry = Entry(
                sequence=len(entries) + 1,
                model=self._model,
                version=version,
                order=order,
                action=action,
                previous=None if previous is None else previous.version,
                at=datetime.now(UTC).isoformat(timespec="microseconds"),
                by=by,
                reason=reason,
            ).sealed(previous)
            key, body = self._key(entry.sequence), entry.model_dump_json(indent=1).encode()
            try:
                self._store.create(key, body)
            except AlreadyThere:
                # If the answer to our own create was lost and the client asked again, we lost to
                # ourselves. Appending once more would enter one decision twice.
                if self._store.read(key) == body:
                    return entry
            else:
                return entry
        raise InfraError(
            f"The ledger of {self._model!r} was appended to by others {ATTEMPTS} times in a row. "
            "Try again."
        )

    def _next(self, found: tuple[Entry, ...], sequence: int) -> Entry:
        key = self._key(sequence)
        at = f"{self._store.root}/{key}"
        try:
            entry = validated(Entry, self._store.read(key))
        except ArtifactMissing as fault:
            raise ArtifactDamaged(
                f"The ledger of {self._model!r} has a gap: {at} is missing, later entries are "
                "there. Restore it from a backup of the store."
            ) from fault
        except ValueError as fault:
            raise ArtifactDamaged(
                f"{at} is not an entry of a ledger. Restore it from a backup of the store."
            ) from fault
        last = found[-1] if found else None
        previous = None if last is None else last.version
        if (entry.sequence, entry.model, entry.previous) != (sequence, self._model, previous):
            raise ArtifactDamaged(
                f"{at} does not continue the entry before it: expected entry {sequence} of "
                f"{self._model!r} after version {previous}, got entry {short(entry.sequence)} of "
                f"{short(entry.model)} after version {short(entry.previous)}. Restore it from a "
                "backup of the store."
            )
        self._check_digest(entry, last, at)
        if entry.action == "rollback":
            target = before(found)
            if target is None or not _same_champion(target, entry):
                raise ArtifactDamaged(
                    f"{at} rolls back to version {short(entry.version)}, order "
                    f"{short(entry.order)}, which was not champion before. Restore it from a "
                    "backup of the store."
                )
        return entry

    def _check_digest(self, entry: Entry, previous: Entry | None, at: str) -> None:
        if entry.digest is None:
            if previous is not None and previous.digest is not None:
                raise ArtifactDamaged(
                    f"{at} has no digest, and the entry before it has one. Restore it from a "
                    "backup of the store."
                )
        elif entry.digest != entry.sealed(previous).digest:
            changed = at if previous is None else f"{at} or the entry before it"
            raise ArtifactDamaged(
                f"{changed} was changed: the digest does not match. Restore it from a backup of "
                "the store."
            )

    def _check_rollback(self, entries: tuple[Entry, ...], version: str, order: str) -> None:
        target = before(entries)
        if target is None:
            raise Refused(
                f"No version of {self._model!r} was champion before the present one, so there "
                "is nothing to roll back to."
            )
        if target.order != order:
            raise Refused(
                f"A rollback of {self._model!r} goes to version {target.version}, not to "
                f"{version}. To choose another version, promote it."
            )

    def _moved_on(self, entries: tuple[Entry, ...], expected: int) -> str:
        if len(entries) < expected:
            return f"The ledger of {self._model!r} has no entry {expected} (any more)."
        won = entries[expected]
        return (
            f"The ledger of {self._model!r} moved on: {won.by} made version {won.version} "
            f"champion at {won.at} ({won.action}: {won.reason}). Look at it, then decide again."
        )

    def _key(self, sequence: int) -> str:
        return f"{self._home}{sequence:08d}.json"

    def _key_of(self, number: str) -> str | None:
        return self._key(int(number)) if number.isascii() and number.isdigit() else None


def before(entries: tuple[Entry, ...]) -> Entry | None:
    """The entry that a rollback returns to: the promotion below the current champion's.

    A promotion puts an order on a stack, a rollback removes the top. So two rollbacks go back two
    steps, and an order that was rolled back is not returned to after a later promotion. Promoting
    the champion again changes nothing.

    Returns:
        None if there is nothing below the champion.
    """
    stack = _stack(entries)
    return stack[-2] if len(stack) > 1 else None


def undone(entries: tuple[Entry, ...]) -> tuple[str, ...]:
    """The orders that rollbacks removed since the last promotion, the latest first."""
    removed: list[str] = []
    for end in range(len(entries), 0, -1):
        if entries[end - 1].action != "rollback":
            break
        removed.append(entries[end - 2].order)
    return tuple(removed)


def _stack(entries: tuple[Entry, ...]) -> list[Entry]:
    stack: list[Entry] = []
    for entry in entries:
        if entry.action == "rollback":
            stack.pop()
        elif not stack or not _same_champion(stack[-1], entry):
            stack.append(entry)
    return stack


def _same_champion(earlier: Entry, entry: Entry) -> bool:
    """Whether two entries name one champion, by the rule under which ``entry`` was written."""
    if entry.digest is None:
        return earlier.version == entry.version
    return earlier.order == entry.order
