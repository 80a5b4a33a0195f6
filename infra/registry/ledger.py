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
from infra.bundle.json_limits import validated
from infra.bundle.json_reader import short
from infra.errors import (
    AlreadyThere,
    ArtifactDamaged,
    ArtifactMissing,
    ConcurrentChange,
    PromotionRefused,
    StoreRefused,
)
from infra.store.manifest import plain_path
from infra.store.object_store import Store

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
        StoreRefused: ``model`` cannot be part of a key.
    """

    def __init__(self, store: Store, model: str) -> None:
        try:
            plain_path(model)
        except ValueError as fault:
            raise StoreRefused("model_name_no_path", problem=str(fault)) from fault
        if "/" in model or ":" in model:
            raise StoreRefused("model_name_characters", got=short(model))
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
                raise ArtifactDamaged("ledger_key_unknown", place=f"{self._store.root}/{key}")
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
            PromotionRefused: a rollback to another order than ``before`` names.
            ArtifactDamaged: as ``entries``.
        """
        for _ in range(ATTEMPTS):
            entries = self.entries()
            if expected is not None and len(entries) != expected:
                raise self._moved_on(entries, expected)
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
        raise ConcurrentChange("ledger_contention", model=self._model, attempts=ATTEMPTS)

    def _next(self, found: tuple[Entry, ...], sequence: int) -> Entry:
        key = self._key(sequence)
        at = f"{self._store.root}/{key}"
        try:
            entry = validated(Entry, self._store.read(key))
        except ArtifactMissing as fault:
            raise ArtifactDamaged("ledger_gap", model=self._model, place=at) from fault
        except ValueError as fault:
            raise ArtifactDamaged("ledger_entry_unreadable", place=at) from fault
        last = found[-1] if found else None
        previous = None if last is None else last.version
        if (entry.sequence, entry.model, entry.previous) != (sequence, self._model, previous):
            raise ArtifactDamaged(
                "ledger_entry_out_of_order",
                place=at,
                sequence=sequence,
                model=self._model,
                previous=previous,
                got_sequence=short(entry.sequence),
                got_model=short(entry.model),
                got_previous=short(entry.previous),
            )
        self._check_digest(entry, last, at)
        if entry.action == "rollback":
            target = before(found)
            if target is None or not _same_champion(target, entry):
                raise ArtifactDamaged(
                    "ledger_rollback_unfounded",
                    place=at,
                    version=short(entry.version),
                    order=short(entry.order),
                )
        return entry

    def _check_digest(self, entry: Entry, previous: Entry | None, at: str) -> None:
        if entry.digest is None:
            if previous is not None and previous.digest is not None:
                raise ArtifactDamaged("ledger_digest_missing", place=at)
        elif entry.digest != entry.sealed(previous).digest:
            changed = at if previous is None else f"{at} or the entry before it"
            raise ArtifactDamaged("ledger_digest_differs", changed=changed)

    def _check_rollback(self, entries: tuple[Entry, ...], version: str, order: str) -> None:
        target = before(entries)
        if target is None:
            raise PromotionRefused("nothing_to_roll_back", model=self._model)
        if target.order != order:
            raise PromotionRefused(
                "rollback_to_other_version", model=self._model, expected=target.version, got=version
            )

    def _moved_on(self, entries: tuple[Entry, ...], expected: int) -> AlreadyThere:
        if len(entries) < expected:
            return AlreadyThere("ledger_shorter", model=self._model, expected=expected)
        won = entries[expected]
        return AlreadyThere(
            "ledger_moved_on",
            model=self._model,
            by=won.by,
            version=won.version,
            at=won.at,
            action=won.action,
            reason=won.reason,
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
