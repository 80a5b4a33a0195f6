"""A foreign parquet file is read first by a child process: nothing in it ends or fills the parent.

The attacks write thrift by hand where a writer would refuse to.
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
from error_codes import Text, raises_code, raises_value_error

from compressors.contracts import DenseInput, IdInput, JaggedBag, Output, PaddedBag, Signature
from infra.data import parquet_inspector
from infra.data.parquet_inspection import MEMORY_LIMIT, inspect
from infra.data.parquet_inspector import Inspector, inspect_parquet
from infra.data.splits import check_shapes, prepare, split_statistics
from infra.errors import DataRefused, OutOfMemory

COLUMNS = ("user", "genres", "price", "label")


def signature(longest: int = 3) -> Signature:
    return Signature(
        inputs=(
            IdInput(name="user", table="user"),
            JaggedBag(name="genres", table="genres", shape=(longest,)),
            DenseInput(name="price", shape=(1,)),
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )


def rows(count: int = 600) -> pa.Table:
    random_ = np.random.default_rng(0)
    lists = [list(range(length)) for length in random_.integers(0, 4, count)]
    return pa.table(
        {
            "user": random_.integers(0, 50, count),
            "genres": pa.array(lists, pa.list_(pa.int64())),
            "price": random_.normal(size=count).astype("f4"),
            "label": random_.integers(0, 2, count),
        }
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.parquet"
    pq.write_table(rows(), path)
    return path.read_bytes()


@pytest.fixture
def inspector():
    own = Inspector()
    yield own
    own.close()


def refusal(path: Path, into: Path, longest: int = 3) -> str:
    with pytest.raises(DataRefused) as caught:
        prepare(path, signature(longest), into)
    return str(caught.value)


def footer_of(raw: bytes) -> tuple[int, bytes]:
    length = struct.unpack("<I", raw[-8:-4])[0]
    return len(raw) - 8 - length, raw[-8 - length : -8]


def with_footer(raw: bytes, footer: bytes) -> bytes:
    start, _ = footer_of(raw)
    return raw[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def varint(number: int) -> bytes:
    number = number << 1  # zigzag of a positive number
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize("declared", [0, 601, 10**6, 10**9, 2**31, 2**62])
def test_rows_are_counted_and_never_taken_from_the_footer(tmp_path, good, declared):
    path = tmp_path / "x.parquet"
    _, footer = footer_of(good)
    path.write_bytes(with_footer(good, footer.replace(varint(600), varint(declared))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    assert "x.parquet" in refusal(path, tmp_path)
    assert time.monotonic() - begin < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def attempt(path: Path, into: Path) -> bool:
    """Whether a file is prepared; every other ending than a refusal is an error."""
    try:
        prepare(path, signature(), into)
    except DataRefused:
        return False
    return True


def flipped(raw: bytes, seed: int, *, footer: bool) -> bytes:
    draw, damaged = random.Random(seed), bytearray(raw)
    begin = footer_of(raw)[0] if footer else 0
    for _ in range(draw.choice([1, 1, 2, 3, 8, 20])):
        damaged[draw.randrange(begin, len(raw))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.1:
        damaged = damaged[: draw.randrange(len(raw))]
    return bytes(damaged)


def check_flips(good: bytes, into: Path, count: int) -> None:
    path, prepared = into / "x.parquet", 0
    for seed in range(count):
        path.write_bytes(flipped(good, seed, footer=seed % 2 == 0))
        prepared += attempt(path, into)
    assert prepared < count


def test_60_damaged_files_are_refused_or_read_without_harm(good, tmp_path):
    check_flips(good, tmp_path, 60)


@pytest.mark.slow
def test_1000_damaged_files_are_refused_or_read_without_harm(good, tmp_path):
    check_flips(good, tmp_path, 1000)


def test_a_footer_that_aborts_the_reader_is_refused(tmp_path, good, inspector):
    """Seeds that abort pyarrow's C++ reader; found by trying, so the ending itself is not fixed."""
    path, endings = tmp_path / "x.parquet", []
    for seed in range(0, 400, 2):
        path.write_bytes(flipped(good, seed, footer=True))
        try:
            inspector.inspect(path, COLUMNS)
        except DataRefused as fault:
            if "ended with SIG" in str(fault):
                endings.append(str(fault))
                break
    assert inspector.inspect(write_good(tmp_path, good), COLUMNS).rows == 600, "a new child reads"
    assert endings, "no damaged footer ended the reader: this pyarrow may be repaired"


def write_good(folder: Path, good: bytes) -> Path:
    (folder / "good.parquet").write_bytes(good)
    return folder / "good.parquet"


def test_a_child_that_is_killed_is_a_fault_of_the_machine(tmp_path, good, inspector):
    path = write_good(tmp_path, good)
    inspector.inspect(path, COLUMNS)
    child = inspector._child
    child._process.send_signal(signal.SIGSTOP)
    os.kill(child._process.pid, signal.SIGKILL)
    os.utime(path)
    with raises_code(OutOfMemory, "reader_killed", file=str(path)):
        inspector.inspect(path, COLUMNS)
    assert inspector.inspect(path, COLUMNS).rows == 600


def test_a_file_that_takes_too_long_is_refused_with_the_limit(
    tmp_path, good, inspector, monkeypatch
):
    path = write_good(tmp_path, good)
    inspector.inspect(path, COLUMNS)
    os.utime(path)
    os.kill(inspector._child._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(parquet_inspector, "SECONDS", 0.5)
    with raises_code(DataRefused, "reader_timed_out", file=str(path)) as caught:
        inspector.inspect(path, COLUMNS)
    assert 0.5 < caught.value.fields["seconds"] < 1.5


@pytest.mark.slow
def test_one_value_of_gigabytes_is_refused_by_the_memory_limit(tmp_path, inspector):
    path = tmp_path / "x.parquet"
    huge = pa.array(["x" * 2**30], pa.large_string())
    with pq.ParquetWriter(path, pa.schema([("a", pa.large_string())]), compression="zstd") as out:
        out.write_table(pa.table({"a": pa.chunked_array([huge])}))
    del huge
    assert path.stat().st_size < 10**6
    with pytest.raises(DataRefused) as caught:
        inspector.inspect(path, ("a",))
    assert caught.value.code in {"reader_memory", "expands_too_far"}


def test_a_repeated_dictionary_value_that_expands_to_gigabytes_is_refused(tmp_path, inspector):
    path = tmp_path / "x.parquet"
    indices = pa.array(np.zeros(60_000, np.int32))
    bomb = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 10**6]))
    pq.write_table(pa.table({"a": bomb}), path, compression="zstd")
    assert path.stat().st_size < 10**6
    with pytest.raises(DataRefused) as caught:
        inspector.inspect(path, ("a",))
    assert caught.value.code in {"reader_memory", "expands_too_far"}


def write_repeated(path: Path, count: int) -> None:
    part = pa.table({"a": pa.array(np.zeros(10**6, np.int64))})
    with pq.ParquetWriter(path, part.schema, compression="zstd") as out:
        for _ in range(count // 10**6):
            out.write_table(part)


def test_5_million_equal_rows_are_legal_and_200_million_in_few_bytes_are_refused(
    tmp_path, inspector
):
    write_repeated(tmp_path / "few.parquet", 5 * 10**6)
    assert inspector.inspect(tmp_path / "few.parquet", ("a",)).rows == 5 * 10**6
    write_repeated(tmp_path / "many.parquet", 200 * 10**6)
    assert (tmp_path / "many.parquet").stat().st_size < 10**6
    with raises_code(DataRefused, "expands_too_far", most_bytes=2**30):
        inspector.inspect(tmp_path / "many.parquet", ("a",))


def test_a_file_of_a_million_columns_is_refused(tmp_path, inspector):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({f"c{place}": [1] for place in range(20_001)}), path)
    with raises_code(DataRefused, "too_many_columns", columns=20_001):
        inspector.inspect(path, ("c0",))


def test_counts_are_those_of_the_table(tmp_path, inspector):
    path, table = tmp_path / "x.parquet", rows()
    pq.write_table(table, path, row_group_size=100)
    found = inspector.inspect(path, COLUMNS)
    lengths = [len(value) for value in table["genres"].to_pylist()]
    assert found.rows == 600
    assert (found.values["genres"], found.longest["genres"]) == (sum(lengths), max(lengths))
    assert found.values["user"] == 600
    assert dict(found.kinds)["genres"] == "list of integer"


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path, good, inspector):
    path = write_good(tmp_path, good)
    first = inspector.inspect(path, COLUMNS)
    inspector.close()
    assert inspector.inspect(path, COLUMNS) is first
    assert inspector._child is None, "no process was needed"
    pq.write_table(rows(601), path)
    assert inspector.inspect(path, COLUMNS).rows == 601


def test_a_forked_process_starts_a_child_of_its_own(tmp_path, good):
    path = write_good(tmp_path, good)
    inspect_parquet(path, COLUMNS)
    os.utime(path)
    if (pid := os.fork()) == 0:
        os._exit(0 if inspect_parquet(path, ("user",)).rows == 600 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    os.utime(path)
    assert inspect_parquet(path, COLUMNS).rows == 600


ENDS_WITH_PARENT = """
import os, sys, time
from pathlib import Path
from infra.data import parquet_inspector
parquet_inspector.inspect_parquet(Path(sys.argv[1]), ("user",))
print(parquet_inspector._inspector._child._process.pid, flush=True)
time.sleep(60)
"""


def test_the_child_ends_when_its_parent_is_killed(tmp_path, good):
    path = write_good(tmp_path, good)
    command = [sys.executable, "-c", ENDS_WITH_PARENT, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


LOW_LIMIT = """
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
def test_too_little_memory_of_the_process_is_not_a_fault_of_the_file(tmp_path, good, limit):
    path = write_good(tmp_path, good)
    command = [sys.executable, "-c", LOW_LIMIT, str(path), str(limit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    expected = ("600", "OutOfMemory True", "ChildFailed True")
    assert ended.stdout.strip() in expected, ended.stderr[-1000:]


def test_a_dense_list_of_another_width_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"v": [[1.0, 2.0]] * 10, "label": [0, 1] * 5}), path)
    wide = signature().model_copy(update={"inputs": (DenseInput(name="v", shape=(60_000,)),)})
    with raises_code(
        DataRefused,
        "schema_unfit",
        problems=Text("has 60000 values in a row, and the longest list has 2"),
    ):
        prepare(path, wide, tmp_path)


@pytest.mark.parametrize("kind", [PaddedBag, JaggedBag])
def test_a_bag_far_longer_than_any_list_in_the_data_is_refused(tmp_path, kind):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"v": [[1, 2]] * 10, "label": [0, 1] * 5}), path)

    def bag(longest: int) -> Signature:
        item = kind(name="v", table="t", shape=(longest,))
        return signature().model_copy(update={"inputs": (item,)})

    facts = {"test": split_statistics(path, bag(3))}
    check_shapes(facts, bag(4096))
    with raises_code(
        DataRefused,
        "shapes_unfit",
        problems=Text("lists of 4097 ids, and the longest in the data has 2"),
    ):
        check_shapes(facts, bag(4097))


@pytest.mark.parametrize("shape", [65_537, 10**6, 10**12, 2**63, 10**300])
def test_a_shape_beyond_any_batch_is_refused_by_the_signature(shape):
    for kind in (PaddedBag, JaggedBag):
        with raises_value_error("row_too_large", name="v", values=shape, most=65_536):
            kind(name="v", table="t", shape=(shape,))
    with raises_value_error("row_too_large", name="v", values=shape, most=65_536):
        DenseInput(name="v", shape=(shape,))


def test_rows_that_do_not_fit_in_memory_are_refused_before_they_are_allocated(
    tmp_path, good, monkeypatch
):
    path = write_good(tmp_path, good)
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "1")
    with raises_code(OutOfMemory, "step_memory", needed_mib=0, available_mib=0):
        prepare(path, signature(), tmp_path)


def test_the_limit_of_memory_is_far_above_what_a_batch_of_wide_rows_takes(tmp_path):
    path = tmp_path / "x.parquet"
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.zeros(4096 * 2000, np.float64)), 4096
    ).cast(pa.list_(pa.float64()))
    pq.write_table(pa.table({"v": vectors}), path)
    found = inspect(str(path), ("v",))
    assert found["batch_rows"] * 4096 * 8 < MEMORY_LIMIT / 8
