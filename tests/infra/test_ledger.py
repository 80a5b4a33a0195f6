"""The promotion ledger: concurrent appends, rollbacks, and detection of damaged entries.

An entry records one change of the champion: a promotion or a rollback. Its digest covers the digest
of the previous entry. ``expected`` is the last sequence number that the caller has read; 0: an
empty ledger.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import AlreadyThere, ArtifactDamaged, PromotionRefused, StoreRefused
from infra.registry.ledger import Entry, Ledger, find_rollback_target
from infra.store.object_store import Store


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(Store(str(tmp_path / "store")), "ranker")


def promote(ledger: Ledger, version: str, expected: int | None = None) -> Entry:
    """Append a promotion of a version."""
    return ledger.append(
        version,
        order=f"order-{version}",
        action="promote",
        by="ann",
        reason="better",
        expected=expected,
    )


def roll_back(ledger: Ledger) -> str:
    """Append a rollback; return the version that it restores."""
    target = find_rollback_target(ledger.entries())
    assert target is not None
    rollback = ledger.append(
        target.version, target.order, action="rollback", by="bob", reason="worse"
    )
    return rollback.version


def test_entries_are_read_in_order_with_the_version_that_each_replaced(ledger):
    assert ledger.champion() is None
    assert ledger.entries() == ()
    first, second = promote(ledger, "1"), promote(ledger, "4")
    assert (first.sequence, first.previous) == (1, None)
    assert (second.sequence, second.previous) == (2, "1")
    assert ledger.entries() == (first, second)
    assert ledger.champion() == second
    assert second.at.endswith("+00:00")


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_six_concurrent_appends_get_consecutive_sequence_numbers(place, tmp_path, request):
    if place == "s3":
        request.getfixturevalue("s3")
    root = str(tmp_path) if place == "folder" else f"s3://models/ledger-{time.time_ns()}"
    barrier = threading.Barrier(6)

    def append(number: int) -> int:
        barrier.wait()
        return promote(Ledger(Store(root), "ranker"), str(number)).sequence

    with ThreadPoolExecutor(6) as pool:
        sequences = sorted(pool.map(append, range(6)))
    assert sequences == [1, 2, 3, 4, 5, 6]
    entries = Ledger(Store(root), "ranker").entries()
    assert [entry.sequence for entry in entries] == sequences
    assert {entry.version for entry in entries} == set("012345")


def test_promotion_that_expects_an_outdated_ledger_raises_with_the_newest_entry(ledger):
    promote(ledger, "1", expected=0)
    promote(ledger, "2", expected=1)
    with raises_code(AlreadyThere, "ledger_moved_on", by="ann", version="2", reason="better"):
        promote(ledger, "3", expected=1)
    with raises_code(AlreadyThere, "ledger_shorter", expected=7):
        promote(ledger, "3", expected=7)
    assert [entry.version for entry in ledger.entries()] == ["1", "2"]


def test_of_six_concurrent_appends_that_expect_an_empty_ledger_one_succeeds(ledger):
    barrier = threading.Barrier(6)

    def append(number: int) -> bool:
        barrier.wait()
        try:
            promote(ledger, str(number), expected=0)
        except AlreadyThere:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(append, range(6))).count(True) == 1
    assert len(ledger.entries()) == 1


def test_append_whose_response_was_lost_writes_one_entry(ledger, monkeypatch):
    create = ledger._store.create

    def create_and_lose_the_response(key, body):
        create(key, body)
        raise AlreadyThere("key_exists", place=key)  # the client retried and found its own key

    monkeypatch.setattr(ledger._store, "create", create_and_lose_the_response)
    entry = promote(ledger, "1")
    assert ledger.entries() == (entry,)


# --- rollback --------------------------------------------------------------------------------


def test_two_rollbacks_undo_two_promotions(ledger):
    for version in ("1", "2", "3"):
        promote(ledger, version)
    assert roll_back(ledger) == "2"
    assert roll_back(ledger) == "1"
    assert find_rollback_target(ledger.entries()) is None
    with raises_code(PromotionRefused, "nothing_to_roll_back", model="ranker"):
        ledger.append("2", "order-2", "rollback", "bob", "worse")


def test_rollback_does_not_restore_a_version_that_was_rolled_back(ledger):
    for version in ("1", "2"):
        promote(ledger, version)
    assert roll_back(ledger) == "1"
    promote(ledger, "3")
    assert roll_back(ledger) == "1"


def test_promoting_the_champion_again_needs_no_further_rollback(ledger):
    for version in ("1", "2", "2"):
        promote(ledger, version)
    assert roll_back(ledger) == "1"


def test_rollback_restores_a_version_that_was_champion_twice(ledger):
    for version in ("1", "2", "1"):
        promote(ledger, version)
    assert roll_back(ledger) == "2"
    assert roll_back(ledger) == "1"


def test_rollback_to_another_version_than_the_previous_champion_is_refused(ledger):
    for version in ("1", "2", "3"):
        promote(ledger, version)
    with raises_code(PromotionRefused, "rollback_to_other_version", expected="2", got="1"):
        ledger.append("1", "order-1", "rollback", "bob", "worse")


def make_entry(sequence: int, version: str, action: str, previous: str | None) -> Entry:
    """Return an entry whose order has the name of the version."""
    return Entry(
        sequence=sequence,
        model="m",
        version=version,
        order=version,
        action=action,
        previous=previous,
        at="",
        by="",
        reason="",
    )


@given(st.lists(st.sampled_from(["a", "b", "c", "back"]), max_size=20))
def test_rollback_after_a_promotion_restores_the_champion_before_it(actions):
    """The actions before that promotion are promotions of a version, and rollbacks ("back")."""
    entries: list[Entry] = []

    def add(version: str, action: str) -> None:
        previous = entries[-1].version if entries else None
        entries.append(make_entry(len(entries) + 1, version, action, previous))

    for action in actions:
        target = find_rollback_target(tuple(entries))
        if action != "back":
            add(action, "promote")
        elif target is not None:
            add(target.version, "rollback")
    champion = entries[-1].version if entries else None
    target = find_rollback_target(tuple(entries))
    add("new", "promote")
    restored = find_rollback_target(tuple(entries))
    assert (restored.version if restored else None) == champion
    if restored is not None:
        add(restored.version, "rollback")
        # The next rollback restores the same version as before the promotion.
        assert find_rollback_target(tuple(entries)) == target


# --- damage ----------------------------------------------------------------------------------


def test_missing_entry_is_reported_as_damage(ledger, tmp_path):
    for version in ("1", "2", "3"):
        promote(ledger, version)
    (tmp_path / "store" / "ledger" / "ranker" / "00000002.json").unlink()
    with raises_code(ArtifactDamaged, "ledger_gap") as caught:
        ledger.entries()
    assert caught.value.fields["place"].endswith("00000002.json")


def test_entry_that_does_not_continue_the_previous_entry_is_reported_as_damage(ledger):
    first = promote(ledger, "1")
    for forged in (
        first.model_copy(update={"sequence": 2, "previous": "9"}),
        first.model_copy(update={"sequence": 3, "previous": "1"}),
        first.model_copy(update={"sequence": 2, "previous": "1", "action": "rollback"}),
        first.model_copy(update={"sequence": 2, "previous": "1", "model": "other"}),
    ):
        # The digest is recomputed, so that only the changed field can be refused.
        body = forged.add_digest(first).model_dump_json().encode()
        ledger._store.write("ledger/ranker/00000002.json", body)
        with pytest.raises(ArtifactDamaged) as caught:
            ledger.champion()
        assert caught.value.fields["place"].endswith("00000002.json")


def test_changed_entry_with_a_recomputed_digest_is_detected_at_the_next_entry(ledger):
    for version in "123":
        promote(ledger, version)
    first = ledger.entries()[0]
    changed = first.model_copy(update={"reason": "another reason"}).add_digest(None)
    ledger._store.write("ledger/ranker/00000001.json", changed.model_dump_json().encode())
    with raises_code(ArtifactDamaged, "ledger_digest_differs") as caught:
        ledger.entries()
    assert caught.value.fields["changed"].endswith("00000002.json or the entry before it")


@pytest.mark.parametrize("name", ["2.json", "x.json", "00000002.txt", "00000002.json/x"])
def test_unexpected_key_among_the_entries_is_reported_as_damage(ledger, name):
    ledger._store.write(f"ledger/ranker/{name}", b"{}")
    with raises_code(ArtifactDamaged, "ledger_key_unknown"):
        ledger.entries()


@pytest.mark.parametrize("model", ["", "..", "a/b", "a:b", "/a", "a\\b"])
def test_model_name_that_is_not_one_path_component_is_refused(tmp_path, model):
    with raises_code(StoreRefused, None):  # any code
        Ledger(Store(str(tmp_path)), model)


@pytest.mark.parametrize("changed", ["ledger/ranker/00000003.json", "ledger/ranker/0000000q.json"])
def test_listing_with_a_changed_byte_is_read_again_before_the_ledger_counts_as_damaged(
    s3, monkeypatch, changed
):
    store = Store(f"s3://models/ledger-{time.time_ns()}")
    ledger = Ledger(store, "ranker")
    expected = (promote(ledger, "1"), promote(ledger, "2"))
    keys = store.keys("ledger/ranker/")
    assert len(keys[1]) == len(changed)
    responses = [(keys[0], changed), keys]
    monkeypatch.setattr(store, "keys", lambda _: responses.pop(0))
    assert ledger.entries() == expected
    assert responses == []
