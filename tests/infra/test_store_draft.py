"""An artifact while it is written: hashes of pieces in any order, resumed, all or nothing."""

import itertools
import json
import random
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ArtifactDamaged, ArtifactMissing, StoreRefused
from infra.store import draft as store_draft
from infra.store.chunks import hashed, sha256
from infra.store.draft import ArtifactDraft, ChunkHashes, draft, finished
from infra.store.manifest import StoreManifest
from infra.store.object_store import CHUNK_BYTES, Store

Act = Callable[[ArtifactDraft], object]
BODY = random.Random(0).randbytes(2 * CHUNK_BYTES + 1000)


def cut(body: bytes, places: list[int]) -> list[tuple[int, memoryview]]:
    borders = sorted({0, len(body), *(place % (len(body) + 1) for place in places)})
    view = memoryview(body)
    return [(a, view[a:b]) for a, b in itertools.pairwise(borders)]


@given(
    st.binary(max_size=80),
    st.lists(st.integers(0, 80), max_size=12),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
)
def test_chunk_hashes_are_those_of_the_whole_file(body, places, chunk_bytes, rng, threads):
    pieces = cut(body, places)
    rng.shuffle(pieces)
    hashes = ChunkHashes(len(body), chunk_bytes)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: hashes.add(*piece), pieces))
    wanted = [body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)]
    assert hashes.all() == tuple(sha256(chunk) for chunk in wanted)


def test_places_beyond_32_bits_are_counted_in_their_own_chunk():
    size, chunk = 2**33 + 8, 2**30
    hashes = ChunkHashes(size, chunk)
    for at in (2**31, 2**32, 2**33):
        hashes.add(at, memoryview(bytes([1] * 8)))
    with raises_code(ArtifactDamaged, "draft_incomplete", start=0):
        hashes.all()
    assert sorted(hashes._open_chunks) == [2, 4]
    assert hashes._chunk_hashes == {8: sha256(bytes([1] * 8))}


def test_large_pieces_of_two_threads_in_one_chunk_do_not_mix():
    body = memoryview(BODY)
    for _ in range(5):
        hashes = ChunkHashes(len(body))
        gate = threading.Barrier(2)

        def half(start: int, hashes=hashes, gate=gate) -> None:
            gate.wait()
            for at in range(start, len(body), 2 * 2**20):
                hashes.add(at, body[at : at + 2**20])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(half, (0, 2**20)))
        wanted = [BODY[at : at + CHUNK_BYTES] for at in range(0, len(BODY), CHUNK_BYTES)]
        assert hashes.all() == tuple(sha256(chunk) for chunk in wanted)


@pytest.mark.parametrize(("at", "size"), [(0, 3), (2, 1), (8, 2)])
def test_a_byte_is_written_once(at: int, size: int):
    hashes = ChunkHashes(10, 4)
    hashes.add(0, memoryview(b"abcd"))
    hashes.add(8, memoryview(b"ij"))
    with raises_code(ArtifactDamaged, "draft_written_twice"):
        hashes.add(at, memoryview(bytes(size)))


@pytest.mark.parametrize(("at", "size"), [(-1, 1), (9, 2), (11, 0)])
def test_a_byte_outside_the_file_is_refused(at: int, size: int):
    with raises_code(ArtifactDamaged, "draft_outside_file", start=at, size=10):
        ChunkHashes(10, 4).add(at, memoryview(bytes(size)))


def fill(made: ArtifactDraft, rounds: int = 99, size: int = 3 * 2**20) -> None:
    """Write what is missing, ``rounds`` blocks of it."""
    todo = [at for at in range(0, len(BODY), size) if not made.holds(str(at))]
    for at in todo[:rounds]:
        made.write(str(at), [(at, memoryview(BODY)[at : at + size])])


def complete(into: Path) -> StoreManifest:
    with draft(into, "job", "data", len(BODY)) as made:
        fill(made)
        made.add("notes", b"small")
        manifest = made.seal()
        made.publish(manifest)
    return manifest


def test_the_result_is_what_the_store_would_have_hashed(tmp_path: Path):
    manifest = complete(tmp_path / "out")
    files = tmp_path / "out" / "files"
    assert (files / "data").read_bytes() == BODY
    assert (files / "notes").read_bytes() == b"small"
    assert manifest.files == hashed(files, [("data", len(BODY)), ("notes", 5)])
    assert finished(tmp_path / "out") == manifest
    assert Store(str(tmp_path / "store")).put(files).sha256 == manifest.root
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


class Killed(BaseException):
    """The process ended here."""


def interrupted(into: Path, rounds: int, job: str = "job", then: Act | None = None) -> None:
    def run() -> None:
        with draft(into, job, "data", len(BODY)) as made:
            fill(made, rounds)
            if then is not None:
                then(made)
            raise Killed

    with pytest.raises(Killed):
        run()


def test_nothing_is_seen_under_the_name_before_it_is_complete(tmp_path: Path):
    interrupted(tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    with (
        draft(tmp_path / "out", "job", "data", len(BODY)) as made,
        raises_code(ArtifactDamaged, "draft_incomplete"),
    ):
        made.seal()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rounds", [0, 1, 4, 99])
def test_an_interrupted_run_goes_on_with_the_same_result(rounds: int, tmp_path: Path):
    wanted = complete(tmp_path / "whole")
    interrupted(tmp_path / "out", rounds)
    with draft(tmp_path / "out", "job", "data", len(BODY)) as made:
        held = [at for at in range(0, len(BODY), 3 * 2**20) if made.holds(str(at))]
    assert len(held) == min(rounds, 6)
    assert complete(tmp_path / "out") == wanted
    assert (tmp_path / "out" / "files" / "data").read_bytes() == BODY


def test_a_block_whose_bytes_were_lost_is_made_again(tmp_path: Path):
    wanted = complete(tmp_path / "whole")
    interrupted(tmp_path / "out", 4)
    unfinished = tmp_path / ".out.part" / "files" / "data"
    with unfinished.open("r+b") as file:  # a power failure: the journal is ahead of the file
        file.seek(3 * 2**20 + 5)
        file.write(bytes(100))
    with draft(tmp_path / "out", "job", "data", len(BODY)) as made:
        assert [made.holds(str(at * 2**20)) for at in (0, 3, 6, 9)] == [True, False, True, True]
    assert complete(tmp_path / "out") == wanted


def test_a_journal_line_cut_short_is_left_out_and_does_not_hide_later_ones(tmp_path: Path):
    wanted = complete(tmp_path / "whole")
    interrupted(tmp_path / "out", 3)
    journal = tmp_path / ".out.journal"
    journal.write_bytes(journal.read_bytes()[:-9])
    for before, after in ((2, 3), (3, 4)):
        with draft(tmp_path / "out", "job", "data", len(BODY)) as made:
            assert sum(made.holds(str(at)) for at in range(0, len(BODY), 3 * 2**20)) == before
            fill(made, after - before)
    assert complete(tmp_path / "out") == wanted


def test_another_job_starts_over(tmp_path: Path):
    interrupted(tmp_path / "out", 3, "another job")
    with draft(tmp_path / "out", "job", "data", len(BODY)) as made:
        assert not made.holds("0")
    assert complete(tmp_path / "out") == complete(tmp_path / "whole")


def test_a_run_killed_between_its_last_two_steps_ends_well(tmp_path: Path):
    def seal(made: ArtifactDraft) -> None:
        made.add("notes", b"small")
        made.seal()

    interrupted(tmp_path / "out", 99, then=seal)
    assert complete(tmp_path / "out") == complete(tmp_path / "whole")


def test_two_writers_of_one_result_are_one_too_many(tmp_path: Path):
    again = draft(tmp_path / "out", "job", "data", 5)
    with (
        draft(tmp_path / "out", "job", "data", 5),
        raises_code(StoreRefused, "output_in_use", folder=str(tmp_path / "out")),
    ):
        again.__enter__()


def test_a_place_that_holds_something_is_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with raises_code(StoreRefused, "output_not_empty"), draft(tmp_path / "out", "job", "data", 5):
        pass
    with draft(tmp_path / "late", "job", "data", 1) as made:
        made.write("all", [(0, memoryview(b"x"))])
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "mine").write_text("mine")
        manifest = made.seal()
        with raises_code(StoreRefused, "output_not_empty"):
            made.publish(manifest)
    assert (tmp_path / "late" / "mine").read_text() == "mine"


def test_a_fault_of_the_callers_own_is_not_taken_for_one_of_the_disk(tmp_path: Path):
    with pytest.raises(FileNotFoundError), draft(tmp_path / "out", "job", "data", 5):
        raise FileNotFoundError("of the caller")


def test_the_store_takes_what_was_hashed_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = Store(str(tmp_path / "store"))
    monkeypatch.setattr(store_draft, "hashed", None)
    monkeypatch.setattr("infra.store.object_store.hashed", None)
    monkeypatch.setattr("infra.store.artifact_files.verified_chunks", None)
    with draft(tmp_path / "work", "job", "data", len(BODY)) as made:
        fill(made)
        manifest = made.seal()
        artifact = store.take(made.files, manifest)
        made.drop()
    assert artifact.sha256 == manifest.root
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    place = store.local(artifact, tmp_path / "cache")
    assert (place / "data").read_bytes() == BODY
    assert (place / "data").stat().st_mode & 0o222 == 0


def test_a_bucket_takes_it_as_well(tmp_path: Path, s3):
    store = Store("s3://models/drafts")
    with draft(tmp_path / "work", "job", "data", len(BODY)) as made:
        fill(made)
        artifact = store.take(made.files, made.seal())
    assert (store.local(artifact, tmp_path / "cache") / "data").read_bytes() == BODY
    assert store.take(tmp_path / "gone", store.manifest(artifact)) == artifact


@pytest.mark.parametrize("what", ["changed", "longer", "missing", "extra", "manifest"])
def test_a_damaged_result_is_noticed(what: str, tmp_path: Path):
    complete(tmp_path / "out")
    files = tmp_path / "out" / "files"
    (files / "data").chmod(0o644)
    if what == "changed":
        (files / "data").write_bytes(BODY[:-1] + bytes([BODY[-1] ^ 1]))
    elif what == "longer":
        (files / "data").write_bytes(BODY + b"x")
    elif what == "missing":
        (files / "notes").unlink()
    elif what == "extra":
        (files / "more").write_bytes(b"x")
    else:
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        manifest["root"] = "0" * 64
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with raises_code(ArtifactDamaged, "result_damaged"):
        finished(tmp_path / "out")


def test_without_a_manifest_there_is_no_result(tmp_path: Path):
    complete(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with raises_code(ArtifactMissing, "result_incomplete"):
        finished(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ArtifactMissing):
        finished(tmp_path / "out")
