"""Artifacts written block by block: chunk hashes of pieces in any order, resuming, publishing.

These artifacts have one large file (``data``) and a few small ones. A piece is bytes and their
offset ``at`` in the large file. A block is a named list of pieces; after an interruption it is kept
or written again as a whole. A journal lists the written blocks. A chunk is the unit of hashes.
``seal`` makes the files read-only and returns their manifest, which lists their hashes.

Arguments of ``open_writer`` are the folder of the result, the job (any value that determines the
content), and path and size of the large file.
"""

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
from infra.store import artifact_writer
from infra.store.artifact_writer import ArtifactWriter, ChunkHashes, open_writer, verify_result
from infra.store.chunks import hash_files, sha256
from infra.store.manifest import StoreManifest
from infra.store.object_store import CHUNK_BYTES, Store

WriterAction = Callable[[ArtifactWriter], object]
BODY = random.Random(0).randbytes(2 * CHUNK_BYTES + 1000)
BLOCK_BYTES = 3 * 2**20
BLOCK_STARTS = range(0, len(BODY), BLOCK_BYTES)
"""Offsets of the six blocks in which the tests write ``BODY``."""


def cut_into_pieces(body: bytes, cut_points: list[int]) -> list[tuple[int, memoryview]]:
    """Cut ``body`` at these points, modulo its length; return offset and bytes of each piece."""
    cuts = sorted({0, len(body), *(point % (len(body) + 1) for point in cut_points)})
    view = memoryview(body)
    return [(a, view[a:b]) for a, b in itertools.pairwise(cuts)]


@given(
    st.binary(max_size=80),
    st.lists(st.integers(0, 80), max_size=12),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
)
def test_chunk_hashes_do_not_depend_on_the_order_and_cut_of_pieces(
    body, cut_points, chunk_bytes, rng, threads
):
    pieces = cut_into_pieces(body, cut_points)
    rng.shuffle(pieces)
    hashes = ChunkHashes(len(body), chunk_bytes)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: hashes.add(*piece), pieces))
    expected = [body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)]
    assert hashes.all() == tuple(sha256(chunk) for chunk in expected)


def test_chunk_hashes_accept_offsets_beyond_32_bits():
    size, chunk = 2**33 + 8, 2**30
    hashes = ChunkHashes(size, chunk)
    for at in (2**31, 2**32, 2**33):
        hashes.add(at, memoryview(bytes([1] * 8)))
    with raises_code(ArtifactDamaged, "file_incomplete", start=0):
        hashes.all()
    # The pieces begin in the chunks 2, 4 and 8. Chunk 8 is complete with its 8 bytes.
    assert sorted(hashes._open_chunks) == [2, 4]
    assert hashes._chunk_hashes == {8: sha256(bytes([1] * 8))}


def test_chunk_hashes_of_pieces_added_by_two_threads_equal_the_expected_hashes():
    body = memoryview(BODY)
    for _ in range(5):
        hashes = ChunkHashes(len(body))
        barrier = threading.Barrier(2)

        def add_every_second_piece(start: int, hashes=hashes, barrier=barrier) -> None:
            barrier.wait()
            for at in range(start, len(body), 2 * 2**20):
                hashes.add(at, body[at : at + 2**20])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(add_every_second_piece, (0, 2**20)))
        expected = [BODY[at : at + CHUNK_BYTES] for at in range(0, len(BODY), CHUNK_BYTES)]
        assert hashes.all() == tuple(sha256(chunk) for chunk in expected)


@pytest.mark.parametrize(("at", "size"), [(0, 3), (2, 1), (8, 2)])
def test_byte_added_twice_is_refused(at: int, size: int):
    hashes = ChunkHashes(10, 4)
    hashes.add(0, memoryview(b"abcd"))
    hashes.add(8, memoryview(b"ij"))
    with raises_code(ArtifactDamaged, "file_written_twice"):
        hashes.add(at, memoryview(bytes(size)))


@pytest.mark.parametrize(("at", "size"), [(-1, 1), (9, 2), (11, 0)])
def test_byte_outside_the_file_is_refused(at: int, size: int):
    with raises_code(ArtifactDamaged, "file_overrun", start=at, size=10):
        ChunkHashes(10, 4).add(at, memoryview(bytes(size)))


def write_missing_blocks(writer: ArtifactWriter, max_blocks: int = 99) -> None:
    """Write at most ``max_blocks`` of the blocks of ``BODY`` that are not written yet.

    There are six blocks, so 99 stands for all.
    """
    missing = [start for start in BLOCK_STARTS if not writer.has_block(str(start))]
    for start in missing[:max_blocks]:
        block = memoryview(BODY)[start : start + BLOCK_BYTES]
        writer.write(str(start), [(start, block)])


def write_and_publish(into: Path) -> StoreManifest:
    """Write a whole artifact, or the rest of an interrupted one, and publish it."""
    with open_writer(into, "job", "data", len(BODY)) as writer:
        write_missing_blocks(writer)
        writer.add("notes", b"small")
        manifest = writer.seal()
        writer.publish(manifest)
    return manifest


def test_published_artifact_has_the_manifest_that_the_store_computes(tmp_path: Path):
    manifest = write_and_publish(tmp_path / "out")
    files = tmp_path / "out" / "files"
    assert (files / "data").read_bytes() == BODY
    assert (files / "notes").read_bytes() == b"small"
    assert manifest.files == hash_files(files, [("data", len(BODY)), ("notes", 5)])
    assert verify_result(tmp_path / "out") == manifest
    assert Store(str(tmp_path / "store")).put(files).sha256 == manifest.root
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


class Killed(BaseException):
    """Simulates that the process is killed."""


def interrupt(
    into: Path, max_blocks: int, job: str = "job", action: WriterAction | None = None
) -> None:
    """Write some blocks, call ``action``, and leave the files of a killed process."""

    def run() -> None:
        with open_writer(into, job, "data", len(BODY)) as writer:
            write_missing_blocks(writer, max_blocks)
            if action is not None:
                action(writer)
            raise Killed

    with pytest.raises(Killed):
        run()


def test_incomplete_artifact_cannot_be_sealed_and_leaves_no_result(tmp_path: Path):
    interrupt(tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    with (
        open_writer(tmp_path / "out", "job", "data", len(BODY)) as writer,
        raises_code(ArtifactDamaged, "file_incomplete"),
    ):
        writer.seal()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("max_blocks", [0, 1, 4, 99])
def test_interrupted_run_resumes_and_gives_the_same_result(max_blocks: int, tmp_path: Path):
    expected = write_and_publish(tmp_path / "whole")
    interrupt(tmp_path / "out", max_blocks)
    with open_writer(tmp_path / "out", "job", "data", len(BODY)) as writer:
        written = [start for start in BLOCK_STARTS if writer.has_block(str(start))]
    assert len(written) == min(max_blocks, len(BLOCK_STARTS))
    assert write_and_publish(tmp_path / "out") == expected
    assert (tmp_path / "out" / "files" / "data").read_bytes() == BODY


def test_block_with_lost_bytes_is_written_again(tmp_path: Path):
    expected = write_and_publish(tmp_path / "whole")
    interrupt(tmp_path / "out", 4)
    unfinished = tmp_path / ".out.part" / "files" / "data"
    with unfinished.open("r+b") as file:  # as after a power failure that lost these bytes
        file.seek(BLOCK_BYTES + 5)
        file.write(bytes(100))
    with open_writer(tmp_path / "out", "job", "data", len(BODY)) as writer:
        is_written = [writer.has_block(str(start)) for start in BLOCK_STARTS[:4]]
        assert is_written == [True, False, True, True]
    assert write_and_publish(tmp_path / "out") == expected


def test_incomplete_journal_line_is_ignored_and_later_lines_are_read(tmp_path: Path):
    expected = write_and_publish(tmp_path / "whole")
    interrupt(tmp_path / "out", 3)
    journal = tmp_path / ".out.journal"
    journal.write_bytes(journal.read_bytes()[:-9])  # cuts the line of the third block
    for count_before, count_after in ((2, 3), (3, 4)):
        with open_writer(tmp_path / "out", "job", "data", len(BODY)) as writer:
            assert sum(writer.has_block(str(start)) for start in BLOCK_STARTS) == count_before
            write_missing_blocks(writer, count_after - count_before)
    assert write_and_publish(tmp_path / "out") == expected


def test_unfinished_artifact_of_another_job_is_not_resumed(tmp_path: Path):
    interrupt(tmp_path / "out", 3, "another job")
    with open_writer(tmp_path / "out", "job", "data", len(BODY)) as writer:
        assert not writer.has_block("0")
    assert write_and_publish(tmp_path / "out") == write_and_publish(tmp_path / "whole")


def test_run_killed_after_seal_resumes_and_gives_the_same_result(tmp_path: Path):
    def seal(writer: ArtifactWriter) -> None:
        writer.add("notes", b"small")
        writer.seal()

    interrupt(tmp_path / "out", 99, action=seal)
    assert write_and_publish(tmp_path / "out") == write_and_publish(tmp_path / "whole")


def test_second_writer_of_one_result_is_refused(tmp_path: Path):
    second_writer = open_writer(tmp_path / "out", "job", "data", 5)
    with (
        open_writer(tmp_path / "out", "job", "data", 5),
        raises_code(StoreRefused, "output_in_use", folder=str(tmp_path / "out")),
    ):
        second_writer.__enter__()


def test_folder_with_files_is_refused_at_the_start_and_at_publish(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with (
        raises_code(StoreRefused, "output_not_empty"),
        open_writer(tmp_path / "out", "job", "data", 5),
    ):
        pass
    with open_writer(tmp_path / "late", "job", "data", 1) as writer:
        writer.write("all", [(0, memoryview(b"x"))])
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "mine").write_text("mine")
        manifest = writer.seal()
        with raises_code(StoreRefused, "output_not_empty"):
            writer.publish(manifest)
    assert (tmp_path / "late" / "mine").read_text() == "mine"


def test_exception_of_the_caller_is_not_translated(tmp_path: Path):
    with pytest.raises(FileNotFoundError), open_writer(tmp_path / "out", "job", "data", 5):
        raise FileNotFoundError("of the caller")


def test_store_takes_a_sealed_artifact_without_hashing_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """``take`` moves the files to the store; ``drop`` removes the folder of the writer."""
    store = Store(str(tmp_path / "store"))
    # None: a call of one of these functions, which read and hash files, would fail.
    monkeypatch.setattr(artifact_writer, "hash_files", None)
    monkeypatch.setattr("infra.store.object_store.hash_files", None)
    monkeypatch.setattr("infra.store.artifact_files.read_verified_chunks", None)
    with open_writer(tmp_path / "work", "job", "data", len(BODY)) as writer:
        write_missing_blocks(writer)
        manifest = writer.seal()
        artifact = store.take(writer.files, manifest)
        writer.drop()
    assert artifact.sha256 == manifest.root
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    links = store.local(artifact, tmp_path / "cache")
    assert (links / "data").read_bytes() == BODY
    assert (links / "data").stat().st_mode & 0o222 == 0


def test_bucket_takes_a_sealed_artifact(tmp_path: Path, s3):
    store = Store("s3://models/drafts")
    with open_writer(tmp_path / "work", "job", "data", len(BODY)) as writer:
        write_missing_blocks(writer)
        artifact = store.take(writer.files, writer.seal())
    assert (store.local(artifact, tmp_path / "cache") / "data").read_bytes() == BODY
    assert store.take(tmp_path / "gone", store.manifest(artifact)) == artifact


@pytest.mark.parametrize("damage", ["changed", "longer", "missing", "extra", "manifest"])
def test_verify_result_refuses_a_damaged_result(damage: str, tmp_path: Path):
    write_and_publish(tmp_path / "out")
    files = tmp_path / "out" / "files"
    (files / "data").chmod(0o644)
    if damage == "changed":
        (files / "data").write_bytes(BODY[:-1] + bytes([BODY[-1] ^ 1]))
    elif damage == "longer":
        (files / "data").write_bytes(BODY + b"x")
    elif damage == "missing":
        (files / "notes").unlink()
    elif damage == "extra":
        (files / "more").write_bytes(b"x")
    else:
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        manifest["root"] = "0" * 64
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with raises_code(ArtifactDamaged, "result_damaged"):
        verify_result(tmp_path / "out")


def test_verify_result_without_a_manifest_is_a_missing_artifact(tmp_path: Path):
    write_and_publish(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    with raises_code(ArtifactMissing, "result_incomplete"):
        verify_result(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ArtifactMissing):
        verify_result(tmp_path / "out")
