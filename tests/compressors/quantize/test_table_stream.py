"""Tables encoded block by block: equal bytes for every block size, also beyond 32-bit offsets.

A source reads the rows of a table. A job encodes them in blocks of ``block_rows`` rows, and a sink
writes the pieces of each block: bytes and their offset ``at`` in the file. A record describes the
module that replaces the table.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import Tensor

from compressors.core.modules.formats import PackedTable, TensorSpec
from compressors.core.state.module_state import build_module
from compressors.core.state.safetensors_rows import StoredRows, build_spec
from compressors.core.state.safetensors_stream import Piece, StreamedFile
from compressors.errors.compression import ContractBroken, ModelRefused
from compressors.quantize.table_stream import Block, EncodingJob, encode_file
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8


@pytest.fixture(autouse=True, scope="module")
def compile_loops() -> None:
    """Compile the loops first, so that the time limit of an example does not include it."""
    RowwiseInt8().encode(torch.ones(1, 1), {})
    RowwiseInt4(clipping="mse").encode(torch.ones(1, 1), {})


@dataclass(frozen=True)
class TensorSource:
    """A table in memory."""

    values: Tensor

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(tuple(self.values.shape), self.values.dtype)

    def read(self, begin: int, end: int) -> Tensor:
        return self.values[begin:end] if self.values.dim() else self.values

    def memory_map(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class ComputedSource:
    """A table of any size, computed on demand: all weights of row r are (r mod 97) + 1."""

    rows: int
    dim: int

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec((self.rows, self.dim), torch.float32)

    def read(self, begin: int, end: int) -> Tensor:
        return (torch.arange(begin, end) % 97 + 1.0).unsqueeze(1).expand(-1, self.dim)

    def memory_map(self) -> Tensor:
        return torch.empty(self.rows, self.dim, device="meta")


class MemorySink:
    """A sink that writes to memory and counts how often each byte was written.

    It already has the blocks ``existing``.
    """

    def __init__(self, size: int, existing: Sequence[str] = ()) -> None:
        self.file, self.blocks, self.existing = bytearray(size), [], set(existing)
        self.write_counts = bytearray(size)

    def has_block(self, block: str) -> bool:
        return block in self.existing

    def write(self, block: str, pieces: Sequence[Piece]) -> None:
        self.blocks.append(block)
        for offset, data in pieces:
            self.file[offset : offset + len(data)] = data
            self.write_counts[offset : offset + len(data)] = bytes(
                count + 1 for count in self.write_counts[offset : offset + len(data)]
            )


def encode_to_memory(job: EncodingJob, workers: int = 1) -> bytes:
    """The complete file; asserts that every byte was written exactly once."""
    file = StreamedFile(job.layout())
    sink = MemorySink(file.bytes)
    encode_file(job, file, sink, workers)
    assert set(sink.write_counts) == {1}
    return bytes(sink.file)


def encoding_job(
    step: Any, tables: Mapping[str, Tensor], rows: int | None = None, **other_tensors: Tensor
) -> EncodingJob:
    """A job that encodes ``tables`` in blocks of ``rows`` rows and copies the other tensors."""
    sources = {name: TensorSource(values) for name, values in {**tables, **other_tensors}.items()}
    return EncodingJob(step, {name: name.removesuffix(".weight") for name in tables}, sources, rows)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 70), st.integers(1, 3), st.booleans())
def test_tensors_encoded_in_blocks_equal_tensors_encoded_at_once(
    rows: int, dim: int, block_rows: int, workers: int, is_int4: bool
):
    step = RowwiseInt4(clipping="mse") if is_int4 else RowwiseInt8(scale="float32")
    weight = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows + dim))
    result = load(
        encode_to_memory(encoding_job(step, {"user.weight": weight}, block_rows), workers)
    )
    assert result.keys() == {"user.codes", "user.scale"}
    for name, values in step.encode(weight, {}).items():
        assert torch.equal(result[f"user.{name}"], values)


@dataclass(frozen=True)
class SharedEntriesFormat:
    """Stores float16 rows, the sum of every three rows, and the mean row of the table."""

    name: str = "shared_entries"

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {
            "rows": TensorSpec((rows, dim), torch.float16),
            "sums": TensorSpec((-(-rows // 3), dim), torch.float32, rows_per_entry=3),
            "mean": TensorSpec((1, dim), torch.float64, rows_per_entry=0),
        }


@dataclass(frozen=True)
class SharedEntriesStep:
    """A step with tensors per row, per three rows, and for the whole table."""

    kind: str = "shared_entries"
    tables: tuple[str, ...] = ("*",)
    min_rows: int = 1
    storage: SharedEntriesFormat = field(default_factory=SharedEntriesFormat)
    fitted: list[int] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        return {}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        self.fitted.append(len(rows))
        return {"mean": rows.double().mean(dim=0, keepdim=True)}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        centred = block - params["mean"].float()
        sums = torch.stack([part.sum(dim=0) for part in centred.split(3)])
        return {"rows": centred.half(), "sums": sums}


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3))
def test_results_do_not_depend_on_block_size_or_threads_if_rows_share_entries(
    rows: int, block_rows: int, workers: int
):
    weight = torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows))
    at_once = encode_to_memory(encoding_job(SharedEntriesStep(), {"t": weight}, rows))
    job = encoding_job(SharedEntriesStep(), {"t": weight}, block_rows)
    assert encode_to_memory(job, workers) == at_once
    result = load(at_once)
    assert torch.equal(result["t.mean"], weight.double().mean(dim=0, keepdim=True))
    assert len(result["t.sums"]) == -(-rows // 3)


def test_other_tensors_are_copied_and_a_table_can_be_rebuilt_from_its_record():
    weight = torch.randn(50, 6)
    other_tensors = {
        "bias": torch.randn(20_000),
        "count": torch.tensor(3),
        "none": torch.empty(0, 4),
    }
    job = encoding_job(RowwiseInt8(), {"user.weight": weight.bfloat16()}, **other_tensors)
    result = load(encode_to_memory(job, workers=2))
    for name, values in other_tensors.items():
        assert torch.equal(result[name], values)
    table = build_module("user", job.records()["user"])
    assert isinstance(table, PackedTable)
    stored = {name: result[f"user.{name}"] for name in ("codes", "scale")}
    table.load_state_dict(stored, assign=True)
    # Half a level of int8 from the bfloat16 weights that were read.
    error = (table(torch.arange(50)) - weight.bfloat16().float()).abs()
    assert bool((error <= stored["scale"].float() * 0.51).all())


def test_blocks_in_the_sink_are_neither_encoded_nor_fitted_again():
    step, weight = SharedEntriesStep(), torch.randn(12, 2)
    job = encoding_job(step, {"t": weight}, 3)
    file = StreamedFile(job.layout())
    sink = MemorySink(file.bytes, existing=["header", "t@0", "t@6"])
    encode_file(job, file, sink, workers=1)
    # ``header`` is the header of the file, ``t@3`` the block from row 3, and ``t@whole`` the block
    # of the tensors that belong to the whole table.
    assert sink.blocks == ["t@whole", "t@3", "t@9"]
    step.fitted.clear()
    finished_sink = MemorySink(
        file.bytes, existing=["header", "t@whole", "t@0", "t@3", "t@6", "t@9"]
    )
    progress: list[int] = []
    encode_file(job, file, finished_sink, workers=1, progress=progress.append)
    assert finished_sink.blocks == step.fitted == []
    assert sum(progress) == weight.nbytes  # skipped blocks count as progress


def test_streaming_restores_the_number_of_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encode_to_memory(encoding_job(RowwiseInt8(), {"t": torch.randn(40, 2)}, 4), workers=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# A table so large that element numbers and byte offsets exceed 2^31 and 2^32.
ROWS, DIM = 2**32 // 64 + 1000, 64
ELEMENTS = (2**31, 2**32)
BYTES = (2**31, 2**32, 2**33, 2**34)
BORDER_ROWS = sorted({*(n // DIM for n in ELEMENTS), *(n // (4 * DIM) for n in BYTES)})


@pytest.mark.parametrize(
    ("row", "block_rows"),
    [
        # Blocks of 1,000 rows take four times as long as blocks of 4,096, so all but those at the
        # last border are marked ``nightly``.
        pytest.param(
            row,
            block_rows,
            marks=() if block_rows == 4096 or row == BORDER_ROWS[-1] else pytest.mark.nightly,
        )
        for row in BORDER_ROWS
        for block_rows in (1000, 4096)
    ],
)
def test_rows_beyond_32_bit_offsets_are_written_at_their_positions(row: int, block_rows: int):
    job = EncodingJob(RowwiseInt8(), {"t": "t"}, {"t": ComputedSource(ROWS, DIM)}, block_rows)
    file = StreamedFile(job.layout())
    starts = {part: file.find_offset(f"t.{part}") for part in ("codes", "scale")}
    checked_blocks = [
        block for block in job.blocks("t") if block.begin - block_rows <= row <= block.end
    ]
    assert len(checked_blocks) >= 2
    pieces: dict[int, memoryview] = {}

    class CollectingSink:
        def has_block(self, block: str) -> bool:
            return block not in {each.name for each in checked_blocks}

        def write(self, block: str, pieces_of_block: Sequence[Piece]) -> None:
            pieces.update((piece.at, piece.data) for piece in pieces_of_block)

    encode_file(job, file, CollectingSink(), workers=2)
    for block in checked_blocks:
        codes = pieces[starts["codes"] + block.begin * DIM]
        assert len(codes) == (block.end - block.begin) * DIM
        scales = torch.frombuffer(
            bytearray(pieces[starts["scale"] + block.begin * 2]), dtype=torch.float16
        )
        expected_weights = torch.arange(block.begin, block.end) % 97 + 1.0
        # A float16 scale is within 2^-11 of the largest weight over 127.
        torch.testing.assert_close(scales.float() * 127, expected_weights, rtol=2**-10, atol=0)
    assert file.find_offset("t.codes", ROWS) == starts["codes"] + ROWS * DIM


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_nonfinite_weight_raises_an_error_with_its_row_and_table(bad: float):
    weight = torch.ones(100, 4)
    weight[71, 2] = bad
    with raises_code(ModelRefused, "row_not_finite", row=71, table="user.weight"):
        encode_to_memory(encoding_job(RowwiseInt8(), {"user.weight": weight}, 16), workers=2)


def test_finite_weights_whose_sum_overflows_are_encoded():
    encode_to_memory(encoding_job(RowwiseInt8(scale="float32"), {"t": torch.full((8, 8), 3e38)}))


@dataclass(frozen=True)
class FixedEncoding(SharedEntriesStep):
    """A step that returns given tensors as its encoded block."""

    encoded_tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(self.encoded_tensors)


@pytest.mark.parametrize(
    ("encoded_tensors", "code", "fields"),
    [
        ({}, "encoded_names_differ", {"got": (), "expected": ("rows", "sums")}),
        ({"rows": torch.zeros(3, 2).half()}, "encoded_names_differ", {"got": ("rows",)}),
        (
            {"rows": torch.zeros(3, 2).half(), "sums": torch.zeros(2, 2)},
            "encoded_rows_differ",
            {"name": "sums", "got": 2, "expected": 1},
        ),
        (
            {"rows": torch.zeros(3, 2), "sums": torch.zeros(1, 2)},
            "encoded_dtype_differs",
            {"got": "torch.float32", "expected": "torch.float16"},
        ),
        (
            {"rows": torch.zeros(3, 9).half(), "sums": torch.zeros(1, 2)},
            "shape_differs",
            {"got": (3, 9), "expected": (3, 2)},
        ),
    ],
)
def test_a_step_that_does_not_follow_its_layout_raises_contract_broken(
    encoded_tensors: Mapping[str, Tensor], code: str, fields: dict[str, Any]
):
    with raises_code(ContractBroken, code, **fields):
        encode_to_memory(
            encoding_job(FixedEncoding(encoded_tensors=encoded_tensors), {"t": torch.zeros(3, 2)})
        )


def test_a_fit_without_a_tensor_of_the_whole_table_raises_contract_broken():
    class FitWithoutMean(SharedEntriesStep):
        def fit(self, rows: Tensor) -> dict[str, Tensor]:
            return {}

    with raises_code(ContractBroken, "fit_incomplete", name="mean"):
        encode_to_memory(encoding_job(FitWithoutMean(), {"t": torch.zeros(3, 2)}))


def test_two_tensors_with_one_name_raise_model_refused():
    job = encoding_job(
        RowwiseInt8(), {"a.weight": torch.zeros(3, 2)}, **{"a.codes": torch.zeros(1)}
    )
    with raises_code(ModelRefused, "tensor_name_taken", table="a.weight", name="a.codes"):
        job.layout()


# --- rows of a stored tensor -----------------------------------------------------------------


@pytest.fixture
def open_files() -> Iterator[ExitStack]:
    with ExitStack() as files:
        yield files


def stored_rows(open_files: ExitStack, path: Path, name: str, values: Tensor) -> StoredRows:
    """Write a tensor to a safetensors file and return the reader of its rows."""
    save_file({name: values, "other": torch.arange(5)}, path)
    file = open_files.enter_context(path.open("rb"))
    header = int.from_bytes(file.read(8), "little")
    begin = json.loads(file.read(header))[name]["data_offsets"][0]
    rows = StoredRows(path, file.fileno(), name, 8 + header + begin, TensorSource(values).spec)
    assert torch.equal(rows.memory_map(), values)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_stored_rows_are_read_unchanged(dtype: torch.dtype, open_files: ExitStack, tmp_path: Path):
    values = torch.randn(30, 3).to(dtype)
    rows = stored_rows(open_files, tmp_path / "file", "t", values)
    assert torch.equal(rows.read(7, 19), values[7:19])
    assert torch.equal(rows.read(0, 30), values)
    assert rows.read(4, 4).shape == (0, 3)


def test_a_thread_reuses_the_memory_of_its_previous_read(open_files: ExitStack, tmp_path: Path):
    rows = stored_rows(open_files, tmp_path / "file", "t", torch.randn(30, 3))
    first = rows.read(0, 20)
    assert rows.read(10, 20).data_ptr() == first.data_ptr()


def test_a_truncated_file_raises_model_refused(open_files: ExitStack, tmp_path: Path):
    rows = stored_rows(open_files, tmp_path / "file", "t", torch.randn(3000, 3))
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(20_000)
    with raises_code(ModelRefused, "file_truncated", name="t"):
        rows.read(0, 3000)


def test_a_dtype_unknown_to_torch_raises_model_refused():
    with raises_code(ModelRefused, "dtype_unknown", dtype="F4"):
        build_spec("F4", (2,), "t")


def test_the_name_of_a_block_is_its_tensor_and_first_row():
    assert Block("user.weight", 2**40, 2**40 + 5).name == f"user.weight@{2**40}"
