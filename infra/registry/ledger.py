"""The promotion ledger: append-only entries in the object store that decide the champion.

A registry's alias has no compare-and-swap, so two concurrent promotions would overwrite each other
without an error. Every ledger entry is a key, ``ledger/<model>/<sequence>.json``, written by a
conditional create: if two processes write the same number, exactly one succeeds. The registry's
alias is updated from the ledger (``Registry.repair`` in ``mlflow_registry.py``).

The champion is the version in production. A release is what is published for one order, which is
the request to compress a model with certain settings. An entry identifies the champion by the
digest of its order. The version number is only a label: another registry, or a restored one, may
number its versions differently.
"""

from datetime import UTC, datetime
from functools import partial
from typing import Literal

from pydantic import Field

from compressors.contracts import Frozen, digest
from infra.bundle.json_limits import validate_json
from infra.bundle.json_reader import shorten
from infra.errors import (
    AlreadyThere,
    ArtifactDamaged,
    ArtifactMissing,
    ConcurrentChange,
    PromotionRefused,
    StoreRefused,
)
from infra.store.manifest import require_portable_path
from infra.store.object_store import Store

Action = Literal["promote", "rollback"]

ATTEMPTS = 100
"""An append fails after this many attempts in which another process appended first."""

DIGEST_FIELDS = (
    "sequence",
    "model",
    "version",
    "order",
    "action",
    "previous",
    "at",
    "by",
    "reason",
)
"""The fields of an entry that its digest covers, in addition to the previous entry's digest."""


class Entry(Frozen):
    """One change of champion: a promotion or a rollback.

    Attributes:
        sequence: number of the entry, from 1.
        model: registered name of the model.
        version: number of the champion's version in the registry.
        order: digest of the order whose release became champion.
        action: promotion or rollback.
        previous: version number of the champion before; None if there was none.
        at: time of the change.
        by: the person or program that decided.
        reason: why, as text; may be empty.
        digest: checksum of the entry.
    """

    sequence: int = Field(ge=1)
    model: str
    version: str = Field(min_length=1, description="Version number in the registry at that time.")
    order: str = Field(description="Digest of the order whose release became champion.")
    action: Action
    previous: str | None
    at: str = Field(description="UTC, ISO 8601.")
    by: str
    reason: str
    digest: str | None = Field(
        None,
        description="SHA-256 over this entry and the previous entry's digest. None in entries "
        "written by early versions of recpress.",
    )

    def add_digest(self, previous: "Entry | None") -> "Entry":
        """Return a copy whose digest covers this entry and the digest of ``previous``."""
        fields = self.model_dump(mode="json", include=set(DIGEST_FIELDS))
        # If the previous entry has no digest, use the one that it would have as the first entry.
        after = None if previous is None else previous.digest or previous.add_digest(None).digest
        return self.model_copy(update={"digest": digest({**fields, "after": after})})


class Ledger:
    """The ledger entries of one model.

    Args:
        store: the object store that contains the entries.
        model: the model's name, without ``/``.

    Raises:
        StoreRefused: ``model`` cannot be part of a key.
    """

    def __init__(self, store: Store, model: str) -> None:
        try:
            require_portable_path(model)
        except ValueError as fault:
            raise StoreRefused("model_name_no_path", problem=str(fault)) from fault
        if "/" in model or ":" in model:
            raise StoreRefused("model_name_characters", got=shorten(model))
        self._store = store
        self._model = model
        self._folder = f"ledger/{model}/"

    def entries(self) -> tuple[Entry, ...]:
        """Read all entries, oldest first.

        Raises:
            ArtifactDamaged: an entry is missing in the sequence, cannot be read, or does not
                continue the entry before it.
        """
        # A corrupted listing can name an entry that does not exist, so the ledger is read again
        # before it is reported as damaged.
        return self._store.read_with_retry(self._read_all)

    def _read_all(self) -> tuple[Entry, ...]:
        """List and read all entries once, without the retry of ``entries``."""
        last = 0
        for key in self._store.keys(self._folder):
            number = key.removeprefix(self._folder).removesuffix(".json")
            if key != self._format_key(number):
                raise ArtifactDamaged("ledger_key_unknown", place=f"{self._store.root}/{key}")
            last = max(last, int(number))
        entries: list[Entry] = []
        # Read every number up to the last, not only listed keys: a folder listing is not a
        # snapshot, so it may contain entry 6 without entry 5, which was written earlier.
        for sequence in range(1, last + 1):
            earlier = tuple(entries)
            entries.append(self._store.read_with_retry(partial(self._read_next, earlier, sequence)))
        return tuple(entries)

    def champion(self) -> Entry | None:
        """Return the last entry, which names the current champion; None if there is none."""
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
        """Append an entry that makes ``version`` the champion.

        Args:
            version: the version number in the registry.
            order: the digest of the order; for a rollback, the ``order`` of the entry that
                ``find_rollback_target`` returns.
            action: promotion or rollback.
            by: the person or program that decided.
            reason: why.
            expected: the last sequence number that the caller has read, 0 for an empty ledger.
                If the ledger has a later entry, nothing is written. None: append after any entry.

        Raises:
            AlreadyThere: the last sequence number is not ``expected``; the error contains the later
                entry, if there is one.
            PromotionRefused: there is nothing to roll back to, or the rollback is to another order
                than that of ``find_rollback_target``.
            ArtifactDamaged: an entry is missing in the sequence, or cannot be read.
            ConcurrentChange: other processes appended first ``ATTEMPTS`` times in a row.
        """
        for _ in range(ATTEMPTS):
            entries = self.entries()
            if expected is not None and len(entries) != expected:
                raise self._build_outdated_error(entries, expected)
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
            ).add_digest(previous)
            key, body = self._build_key(entry.sequence), entry.model_dump_json(indent=1).encode()
            try:
                self._store.create(key, body)
            except AlreadyThere:
                # If the response to our create was lost and the client retried, the existing entry
                # is ours. Appending again would record one decision twice.
                if self._store.read(key) == body:
                    return entry
            else:
                return entry
        raise ConcurrentChange("ledger_contention", model=self._model, attempts=ATTEMPTS)

    def _read_next(self, entries: tuple[Entry, ...], sequence: int) -> Entry:
        """Read the entry after ``entries`` and check that it continues them."""
        key = self._build_key(sequence)
        place = f"{self._store.root}/{key}"
        try:
            entry = validate_json(Entry, self._store.read(key))
        except ArtifactMissing as fault:
            raise ArtifactDamaged("ledger_gap", model=self._model, place=place) from fault
        except ValueError as fault:
            raise ArtifactDamaged("ledger_entry_unreadable", place=place) from fault
        last = entries[-1] if entries else None
        previous = None if last is None else last.version
        if (entry.sequence, entry.model, entry.previous) != (sequence, self._model, previous):
            raise ArtifactDamaged(
                "ledger_entry_out_of_order",
                place=place,
                sequence=sequence,
                model=self._model,
                previous=previous,
                got_sequence=shorten(entry.sequence),
                got_model=shorten(entry.model),
                got_previous=shorten(entry.previous),
            )
        self._check_digest(entry, last, place)
        if entry.action == "rollback":
            restored = find_rollback_target(entries)
            if restored is None or not _name_same_champion(restored, entry):
                raise ArtifactDamaged(
                    "ledger_rollback_unfounded",
                    place=place,
                    version=shorten(entry.version),
                    order=shorten(entry.order),
                )
        return entry

    def _check_digest(self, entry: Entry, previous: Entry | None, place: str) -> None:
        """Raise ``ArtifactDamaged`` if the digest of an entry is missing or does not match."""
        if entry.digest is None:
            if previous is not None and previous.digest is not None:
                raise ArtifactDamaged("ledger_digest_missing", place=place)
        elif entry.digest != entry.add_digest(previous).digest:
            changed = place if previous is None else f"{place} or the entry before it"
            raise ArtifactDamaged("ledger_digest_differs", changed=changed)

    def _check_rollback(self, entries: tuple[Entry, ...], version: str, order: str) -> None:
        """Raise ``PromotionRefused`` unless a rollback of these entries restores this order."""
        restored = find_rollback_target(entries)
        if restored is None:
            raise PromotionRefused("nothing_to_roll_back", model=self._model)
        if restored.order != order:
            raise PromotionRefused(
                "rollback_to_other_version",
                model=self._model,
                expected=restored.version,
                got=version,
            )

    def _build_outdated_error(self, entries: tuple[Entry, ...], expected: int) -> AlreadyThere:
        """Return the error for a ledger whose last sequence number is not ``expected``."""
        if len(entries) < expected:
            return AlreadyThere("ledger_shorter", model=self._model, expected=expected)
        newer = entries[expected]
        return AlreadyThere(
            "ledger_moved_on",
            model=self._model,
            by=newer.by,
            version=newer.version,
            at=newer.at,
            action=newer.action,
            reason=newer.reason,
        )

    def _build_key(self, sequence: int) -> str:
        return f"{self._folder}{sequence:08d}.json"

    def _format_key(self, number: str) -> str | None:
        """Return the key of a sequence number as text; None if it is not a number."""
        return self._build_key(int(number)) if number.isascii() and number.isdigit() else None


def find_rollback_target(entries: tuple[Entry, ...]) -> Entry | None:
    """Find the promotion that a rollback restores; None if there is no earlier champion.

    A promotion pushes its entry on a stack, a rollback pops one, and the entry below the top is
    returned. So two rollbacks undo two promotions, and a rollback never restores an order
    that was itself rolled back. Promoting the current champion again does not change the stack.
    """
    stack = _build_champion_stack(entries)
    return stack[-2] if len(stack) > 1 else None


def list_rolled_back_orders(entries: tuple[Entry, ...]) -> tuple[str, ...]:
    """List the digests of the orders that were rolled back since the last promotion.

    Returns:
        The order that was rolled back last is first; empty if the last entry is a promotion.
    """
    removed: list[str] = []
    for end in range(len(entries), 0, -1):
        if entries[end - 1].action != "rollback":
            break
        removed.append(entries[end - 2].order)  # the champion before the rollback
    return tuple(removed)


def _build_champion_stack(entries: tuple[Entry, ...]) -> list[Entry]:
    """Return the promotions that were not rolled back, oldest first; the champion is last."""
    stack: list[Entry] = []
    for entry in entries:
        if entry.action == "rollback":
            stack.pop()
        elif not stack or not _name_same_champion(stack[-1], entry):
            stack.append(entry)
    return stack


def _name_same_champion(earlier: Entry, entry: Entry) -> bool:
    """Return whether two entries name the same champion.

    Entries without a digest, of early versions of recpress, identify the champion by its version
    number, later entries by their order.
    """
    if entry.digest is None:
        return earlier.version == entry.version
    return earlier.order == entry.order
