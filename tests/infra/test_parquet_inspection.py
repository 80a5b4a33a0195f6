"""Inspection of untrusted parquet files: a damaged, too large or slow file is only refused.

An inspector reads files in a child process, and starts another one if a file ends the process. Some
tests edit the Thrift encoding of the footer, because no writer produces such a footer.
"""

import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import TextMatching, raises_code, raises_value_error

from compressors.contracts import DenseInput, IdInput, JaggedBag, Output, PaddedBag, Signature
from infra.data import parquet_inspector
from infra.data.parquet_inspection import MEMORY_LIMIT, inspect
from infra.data.parquet_inspector import Inspector, inspect_parquet
from infra.data.split_statistics import check_shapes, split_statistics
from infra.data.splits import prepare
from infra.errors import DataRefused, OutOfMemory

COLUMNS = ("user", "genres", "price", "label")


def signature(longest: int = 3) -> Signature:
    """Return a signature whose lists have at most ``longest`` ids."""
    return Signature(
        inputs=(
            IdInput(name="user", table="user"),
            JaggedBag(name="genres", table="genres", shape=(longest,)),
            DenseInput(name="price", shape=(1,)),
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )


def rows(count: int = 600) -> pa.Table:
    """Return random valid rows for ``signature()``."""
    rng = np.random.default_rng(0)
    lists = [list(range(length)) for length in rng.integers(0, 4, count)]
    return pa.table(
        {
            "user": rng.integers(0, 50, count),
            "genres": pa.array(lists, pa.list_(pa.int64())),
            "price": rng.normal(size=count).astype("f4"),
            "label": rng.integers(0, 2, count),
        }
    )


@pytest.fixture(scope="module")
def valid_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.parquet"
    pq.write_table(rows(), path)
    return path.read_bytes()


@pytest.fixture
def inspector():
    instance = Inspector()
    yield instance
    instance.close()


def refusal_message(path: Path, into: Path, longest: int = 3) -> str:
    """Return the message of the ``DataRefused`` that ``prepare`` raises for a file."""
    with pytest.raises(DataRefused) as caught:
        prepare(path, signature(longest), into)
    return str(caught.value)


def footer_of(raw: bytes) -> tuple[int, bytes]:
    """Return the offset and the bytes of the footer of a parquet file."""
    length = struct.unpack("<I", raw[-8:-4])[0]
    return len(raw) - 8 - length, raw[-8 - length : -8]


def with_footer(raw: bytes, footer: bytes) -> bytes:
    """Return a parquet file with another footer."""
    start, _ = footer_of(raw)
    return raw[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def thrift_varint(number: int) -> bytes:
    """Encode a positive number as in a footer: a zigzag varint."""
    number = number << 1  # zigzag of a positive number
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


@pytest.mark.parametrize("row_count", [0, 601, 10**6, 10**9, 2**31, 2**62])
def test_footer_with_a_wrong_number_of_rows_is_refused(tmp_path, valid_bytes, row_count):
    path = tmp_path / "x.parquet"
    _, footer = footer_of(valid_bytes)
    path.write_bytes(
        with_footer(valid_bytes, footer.replace(thrift_varint(600), thrift_varint(row_count)))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    assert "x.parquet" in refusal_message(path, tmp_path)
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def try_prepare(path: Path, into: Path) -> bool:
    """Return whether a file can be prepared; False if it is refused with ``DataRefused``."""
    try:
        prepare(path, signature(), into)
    except DataRefused:
        return False
    return True


def flip_random_bits(raw: bytes, seed: int, *, footer: bool) -> bytes:
    """Flip some bits of a file, or only of its footer; also truncate one of ten files."""
    rng, damaged = random.Random(seed), bytearray(raw)
    start = footer_of(raw)[0] if footer else 0
    for _ in range(rng.choice([1, 1, 2, 3, 8, 20])):
        damaged[rng.randrange(start, len(raw))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.1:
        damaged = damaged[: rng.randrange(len(raw))]
    return bytes(damaged)


def check_damaged_files(valid_bytes: bytes, into: Path, count: int) -> None:
    """Prepare ``count`` damaged files; fail if one raises another error or if none is refused."""
    path, prepared = into / "x.parquet", 0
    for seed in range(count):
        path.write_bytes(flip_random_bits(valid_bytes, seed, footer=seed % 2 == 0))
        prepared += try_prepare(path, into)
    assert prepared < count


def test_60_damaged_files_raise_no_error_but_data_refused(valid_bytes, tmp_path):
    check_damaged_files(valid_bytes, tmp_path, 60)


@pytest.mark.slow
def test_1000_damaged_files_raise_no_error_but_data_refused(valid_bytes, tmp_path):
    check_damaged_files(valid_bytes, tmp_path, 1000)


def test_footer_that_aborts_the_reader_is_refused(tmp_path, valid_bytes, inspector):
    """Which damage aborts pyarrow's C++ reader depends on its version, so many seeds are tried."""
    path, messages = tmp_path / "x.parquet", []
    for seed in range(0, 400, 2):
        path.write_bytes(flip_random_bits(valid_bytes, seed, footer=True))
        try:
            inspector.inspect(path, COLUMNS)
        except DataRefused as fault:
            if "ended with SIG" in str(fault):
                messages.append(str(fault))
                break
    assert inspector.inspect(write_valid_file(tmp_path, valid_bytes), COLUMNS).rows == 600, (
        "a new child reads the next file"
    )
    assert messages, "no damaged footer ended the reader: this pyarrow may be repaired"


def write_valid_file(folder: Path, valid_bytes: bytes) -> Path:
    (folder / "good.parquet").write_bytes(valid_bytes)
    return folder / "good.parquet"


def test_child_killed_during_a_file_is_out_of_memory(tmp_path, valid_bytes, inspector):
    path = write_valid_file(tmp_path, valid_bytes)
    inspector.inspect(path, COLUMNS)
    child = inspector._child
    child._process.send_signal(signal.SIGSTOP)
    os.kill(child._process.pid, signal.SIGKILL)
    os.utime(path)  # another modification time, so that the inspector reads the file again
    with raises_code(OutOfMemory, "reader_killed", file=str(path)):
        inspector.inspect(path, COLUMNS)
    assert inspector.inspect(path, COLUMNS).rows == 600


def test_file_beyond_the_time_limit_is_refused(tmp_path, valid_bytes, inspector, monkeypatch):
    path = write_valid_file(tmp_path, valid_bytes)
    inspector.inspect(path, COLUMNS)
    os.utime(path)  # another modification time, so that the inspector reads the file again
    os.kill(inspector._child._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(parquet_inspector, "SECONDS", 0.5)
    with raises_code(DataRefused, "reader_timed_out", file=str(path)) as caught:
        inspector.inspect(path, COLUMNS)
    assert 0.5 < caught.value.fields["seconds"] < 1.5


@pytest.mark.slow
def test_file_with_a_value_of_gigabytes_is_refused(tmp_path, inspector):
    path = tmp_path / "x.parquet"
    large_value = pa.array(["x" * 2**30], pa.large_string())
    with pq.ParquetWriter(
        path, pa.schema([("a", pa.large_string())]), compression="zstd"
    ) as writer:
        writer.write_table(pa.table({"a": pa.chunked_array([large_value])}))
    del large_value
    assert path.stat().st_size < 10**6
    with pytest.raises(DataRefused) as caught:
        inspector.inspect(path, ("a",))
    assert caught.value.code in {"reader_memory", "expands_too_far"}


def test_dictionary_value_repeated_to_gigabytes_is_refused(tmp_path, inspector):
    path = tmp_path / "x.parquet"
    indices = pa.array(np.zeros(60_000, np.int32))
    repeated = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 10**6]))
    pq.write_table(pa.table({"a": repeated}), path, compression="zstd")
    assert path.stat().st_size < 10**6
    with pytest.raises(DataRefused) as caught:
        inspector.inspect(path, ("a",))
    assert caught.value.code in {"reader_memory", "expands_too_far"}


def write_repeated(path: Path, count: int) -> None:
    """Write a file with ``count`` equal rows."""
    part = pa.table({"a": pa.array(np.zeros(10**6, np.int64))})
    with pq.ParquetWriter(path, part.schema, compression="zstd") as writer:
        for _ in range(count // 10**6):
            writer.write_table(part)


def test_5_million_equal_rows_are_read_and_200_million_are_refused(tmp_path, inspector):
    write_repeated(tmp_path / "few.parquet", 5 * 10**6)
    assert inspector.inspect(tmp_path / "few.parquet", ("a",)).rows == 5 * 10**6
    write_repeated(tmp_path / "many.parquet", 200 * 10**6)
    assert (tmp_path / "many.parquet").stat().st_size < 10**6
    with raises_code(DataRefused, "expands_too_far", most_bytes=2**30):
        inspector.inspect(tmp_path / "many.parquet", ("a",))


def test_file_with_20001_columns_is_refused(tmp_path, inspector):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({f"c{number}": [1] for number in range(20_001)}), path)
    with raises_code(DataRefused, "too_many_columns", columns=20_001):
        inspector.inspect(path, ("c0",))


def test_inspection_counts_rows_values_and_longest_lists(tmp_path, inspector):
    path, table = tmp_path / "x.parquet", rows()
    pq.write_table(table, path, row_group_size=100)
    counts = inspector.inspect(path, COLUMNS)
    lengths = [len(value) for value in table["genres"].to_pylist()]
    assert counts.rows == 600
    assert (counts.values["genres"], counts.longest["genres"]) == (sum(lengths), max(lengths))
    assert counts.values["user"] == 600
    assert dict(counts.kinds)["genres"] == "list of integer"


def test_inspector_reads_a_file_again_only_after_a_change(tmp_path, valid_bytes, inspector):
    path = write_valid_file(tmp_path, valid_bytes)
    first = inspector.inspect(path, COLUMNS)
    inspector.close()
    assert inspector.inspect(path, COLUMNS) is first
    assert inspector._child is None, "no process was needed"
    pq.write_table(rows(601), path)
    assert inspector.inspect(path, COLUMNS).rows == 601


def test_forked_process_starts_another_child(tmp_path, valid_bytes):
    path = write_valid_file(tmp_path, valid_bytes)
    inspect_parquet(path, COLUMNS)
    os.utime(path)  # another modification time, so that the inspector reads the file again
    if (pid := os.fork()) == 0:
        os._exit(0 if inspect_parquet(path, ("user",)).rows == 600 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    os.utime(path)
    assert inspect_parquet(path, COLUMNS).rows == 600


# Starts the inspecting child process, prints its PID, and waits.
PRINT_CHILD = """
import os, sys, time
from pathlib import Path
from infra.data import parquet_inspector
parquet_inspector.inspect_parquet(Path(sys.argv[1]), ("user",))
print(parquet_inspector._inspector._child._process.pid, flush=True)
time.sleep(60)
"""


def test_child_ends_when_its_parent_is_killed(tmp_path, valid_bytes):
    path = write_valid_file(tmp_path, valid_bytes)
    command = [sys.executable, "-c", PRINT_CHILD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


# Inspects a file with a limit on memory in MiB; prints the number of rows or the error class.
INSPECT_WITH_LIMIT = """
import resource, sys
from pathlib import Path
from infra.errors import InfraError
from infra.data.parquet_inspector import inspect_parquet
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]) * 2**20,) * 2)
try:
    print(inspect_parquet(Path(sys.argv[1]), ("user",)).rows)
except InfraError as fault:
    print(type(fault).__name__, "memory" in str(fault))
"""


@pytest.mark.parametrize("limit", [500, 900])
def test_memory_limit_of_the_process_is_out_of_memory_and_not_a_refused_file(
    tmp_path, valid_bytes, limit
):
    path = write_valid_file(tmp_path, valid_bytes)
    command = [sys.executable, "-c", INSPECT_WITH_LIMIT, str(path), str(limit)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    # The limit suffices, or an error reports that memory ran out.
    expected = ("600", "OutOfMemory True", "ChildFailed True")
    assert process.stdout.strip() in expected, process.stderr[-1000:]


def test_dense_list_of_another_width_is_refused_before_tensors_are_allocated(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"v": [[1.0, 2.0]] * 10, "label": [0, 1] * 5}), path)
    wide = signature().model_copy(update={"inputs": (DenseInput(name="v", shape=(60_000,)),)})
    with raises_code(
        DataRefused,
        "schema_unfit",
        problems=TextMatching("has 60000 values in a row, and the longest list has 2"),
    ):
        prepare(path, wide, tmp_path)


@pytest.mark.parametrize("kind", [PaddedBag, JaggedBag])
def test_check_shapes_refuses_a_bag_far_longer_than_any_list(tmp_path, kind):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"v": [[1, 2]] * 10, "label": [0, 1] * 5}), path)

    def bag(longest: int) -> Signature:
        item = kind(name="v", table="t", shape=(longest,))
        return signature().model_copy(update={"inputs": (item,)})

    # A declared length may be at most 4096 if no list in the data is nearly as long.
    statistics = {"test": split_statistics(path, bag(3))}
    check_shapes(statistics, bag(4096))
    with raises_code(
        DataRefused,
        "shapes_unfit",
        problems=TextMatching("lists of 4097 ids, and the longest in the data has 2"),
    ):
        check_shapes(statistics, bag(4097))


@pytest.mark.parametrize("shape", [65_537, 10**6, 10**12, 2**63, 10**300])
def test_signature_refuses_a_shape_beyond_any_batch(shape):
    for kind in (PaddedBag, JaggedBag):
        with raises_value_error("row_too_large", name="v", values=shape, most=65_536):
            kind(name="v", table="t", shape=(shape,))
    with raises_value_error("row_too_large", name="v", values=shape, most=65_536):
        DenseInput(name="v", shape=(shape,))


def test_tensors_beyond_the_available_memory_are_refused_before_they_are_allocated(
    tmp_path, valid_bytes, monkeypatch
):
    path = write_valid_file(tmp_path, valid_bytes)
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "1")
    # The needed and the available memory are less than a MiB, and the fields are rounded down.
    with raises_code(OutOfMemory, "step_memory", needed_mib=0, available_mib=0):
        prepare(path, signature(), tmp_path)


def test_batch_of_wide_rows_needs_far_less_than_the_memory_limit(tmp_path):
    path = tmp_path / "x.parquet"
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.zeros(4096 * 2000, np.float64)), 4096
    ).cast(pa.list_(pa.float64()))
    pq.write_table(pa.table({"v": vectors}), path)
    counts = inspect(str(path), ("v",))
    assert counts["batch_rows"] * 4096 * 8 < MEMORY_LIMIT / 8
