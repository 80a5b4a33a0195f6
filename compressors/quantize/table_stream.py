"""Encode tables of any size block by block, from a source of rows to a sink of bytes.

Only a few row blocks are in memory at a time. The stored bytes do not depend on the number of rows
per block or on the number of threads: the format's layout determines a row's position in the file,
and rows of different blocks never share a stored number, such as a scale.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compressors.contracts import ModuleRecord
from compressors.core.modules.formats import TensorSpec, row_blocks
from compressors.core.state.safetensors_stream import Piece, StreamedFile, compute_size
from compressors.core.steps.step import TableStep
from compressors.core.steps.table_encoder import TableEncoder
from compressors.errors.compression import CompressionError, ModelRefused

BLOCK_BYTES = 2**22
"""Bytes of a block without ``EncodingJob.block_rows``: it fits in a core's cache with its codes."""

HEADER, WHOLE = "header", "whole"
"""Names of blocks without rows: the file's header, and the tensors of a whole table."""


class Source(Protocol):
    """A stored tensor that can be read piece by piece."""

    @property
    def spec(self) -> TensorSpec:
        """The shape and dtype of the tensor."""

    def read(self, begin: int, end: int) -> Tensor:
        """Read entries ``begin`` to ``end`` of the first dimension, or all of a scalar tensor.

        The result is valid only until the thread reads again.
        """

    def memory_map(self) -> Tensor:
        """Return the whole tensor, memory-mapped."""


class Sink(Protocol):
    """A destination of encoded blocks, such as a file."""

    def has_block(self, block: str) -> bool:
        """Whether an interrupted run has already written the block of this name."""

    def write(self, block: str, pieces: Sequence[Piece]) -> None:
        """Write each piece (some bytes and their offset in the file); called by several threads."""


class Block(NamedTuple):
    """The rows ``begin`` to ``end - 1`` of the tensor named ``source``."""

    source: str
    begin: int
    end: int

    @property
    def name(self) -> str:
        """The name by which a sink knows the block."""
        return f"{self.source}@{self.begin}"


@dataclass(frozen=True)
class EncodingJob:
    """What happens to every tensor of a file: tables are encoded, other tensors are copied.

    Attributes:
        step: the step that encodes the tables, unless ``steps`` has another.
        tables: the tensors to encode: by the tensor's name, the name of the module that has its
            encoded tensors. These are named ``MODULE.NAME``. Other tensors keep their names.
        sources: every tensor of the original files, by name.
        block_rows: rows per block; None for blocks of about ``BLOCK_BYTES``.
        steps: the step with the settings of one table, by the name of its tensor.
    """

    step: TableStep
    tables: Mapping[str, str]
    sources: Mapping[str, Source]
    block_rows: int | None = None
    steps: Mapping[str, TableStep] = field(default_factory=dict)

    def step_of(self, name: str) -> TableStep:
        """Return the step that encodes one table."""
        return self.steps.get(name, self.step)

    @property
    def copied_tensors(self) -> list[str]:
        """Names of the tensors that are copied unchanged."""
        return [name for name in self.sources if name not in self.tables]

    def stored(self, name: str) -> dict[str, TensorSpec]:
        """Return shape and dtype of one table's encoded tensors, by their names in the format."""
        rows, dim = self.sources[name].spec.shape
        step = self.step_of(name)
        return step.storage.layout(rows, dim, step.settings())

    def layout(self) -> dict[str, TensorSpec]:
        """Return shape and dtype of every tensor of the result, by its name in the file.

        Raises:
            ModelRefused: two tensors would have the same name.
        """
        specs = {name: self.sources[name].spec for name in self.copied_tensors}
        for name, module in self.tables.items():
            for tensor, spec in self.stored(name).items():
                full_name = tensor_name(module, tensor)
                if full_name in specs:
                    raise ModelRefused("tensor_name_taken", table=name, name=full_name)
                specs[full_name] = spec
        return specs

    def records(self) -> dict[str, ModuleRecord]:
        """Return, by module name, the records from which a loaded bundle rebuilds the tables."""
        return {
            module: ModuleRecord(
                kind="table",
                format=self.step.storage.name,
                settings={
                    "rows": self.sources[name].spec.shape[0],
                    "dim": self.sources[name].spec.shape[1],
                    **self.step_of(name).settings(),
                },
            )
            for name, module in self.tables.items()
        }

    def blocks(self, name: str) -> Iterator[Block]:
        """Yield the blocks of one tensor, in order."""
        spec = self.sources[name].spec
        rows = spec.shape[0] if spec.shape else 1
        max_rows = max(BLOCK_BYTES * rows // max(compute_size(spec), 1), 1)
        layout = {name: spec}
        if name in self.tables:
            max_rows, layout = self.block_rows or max_rows, self.stored(name)
        for begin, end in row_blocks(layout, rows, max_rows):
            yield Block(name, begin, end)


def tensor_name(module: str, name: str) -> str:
    """Return the full name of a module's tensor; ``name`` is its name in the module."""
    return f"{module}.{name}" if module else name


def encode_file(
    job: EncodingJob,
    file: StreamedFile,
    sink: Sink,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encode or copy every tensor of a job into a file.

    The step is fitted to one table after another, so that the memory of only one fit is needed at a
    time. Several threads encode the blocks of a table.

    Args:
        job: the tensors, and what to do with each.
        file: the positions of the tensors of ``job.layout`` in the file.
        sink: receives the bytes; blocks that it already contains are not encoded again.
        workers: number of threads; by default one per core.
        progress: called with the number of bytes read for each block after it is written.

    Raises:
        ContractBroken: the encoded tensors do not match the step's layout.
        ModelRefused: a weight is NaN or infinite.
        CompressionError: the step cannot be applied to a table.
    """
    if not sink.has_block(HEADER):
        sink.write(HEADER, [Piece(0, memoryview(file.header))])
    threads = workers or len(os.sched_getaffinity(0))
    previous_threads = torch.get_num_threads()
    # Each thread encodes one block at a time. If torch started more threads, they would compete for
    # the cores.
    pool = ThreadPoolExecutor(threads, "encode", initializer=torch.set_num_threads, initargs=(1,))
    submitted: deque[Future[None]] = deque()
    try:
        with pool:
            try:
                for function in _create_block_functions(job, file, sink, progress):
                    submitted.append(pool.submit(function))
                    if len(submitted) > 2 * threads:
                        submitted.popleft().result()
                while submitted:
                    submitted.popleft().result()
            finally:
                for future in submitted:
                    future.cancel()
    finally:
        torch.set_num_threads(previous_threads)


def _create_block_functions(
    job: EncodingJob, file: StreamedFile, sink: Sink, progress: Callable[[int], None] | None
) -> Iterator[Callable[[], None]]:
    """Yield, for each block, a function that encodes or copies it.

    The step is fitted to a table before the functions of its blocks are yielded.
    """

    def bind(block: Block, encode: Callable[[Block], list[Piece]]) -> Callable[[], None]:
        def run() -> None:
            if not sink.has_block(block.name):
                sink.write(block.name, encode(block))
            if progress is not None:
                spec = job.sources[block.source].spec
                rows = spec.shape[0] if spec.shape else 1
                progress(compute_size(spec) // max(rows, 1) * (block.end - block.begin))

        return run

    copier = _BlockCopier(job, file)
    for name in job.copied_tensors:
        yield from (bind(block, copier) for block in job.blocks(name))
    for name in job.tables:
        whole_table = f"{name}@{WHOLE}"
        if sink.has_block(whole_table) and all(
            sink.has_block(block.name) for block in job.blocks(name)
        ):
            # The sink contains every block, so these functions only report progress.
            yield from (bind(block, copier) for block in job.blocks(name))
            continue
        table_encoder = _BlockEncoder(job, file, name)
        if not sink.has_block(whole_table):
            sink.write(whole_table, table_encoder.whole())
        yield from (bind(block, table_encoder) for block in job.blocks(name))


@dataclass(frozen=True)
class _BlockCopier:
    """Copies the blocks of tensors that are not encoded."""

    job: EncodingJob
    file: StreamedFile

    def __call__(self, block: Block) -> list[Piece]:
        values = self.job.sources[block.source].read(block.begin, block.end)
        return [self.file.piece(block.source, values, block.begin)]


class _BlockEncoder:
    """Encodes the blocks of one table; the constructor fits the step to the table."""

    def __init__(self, job: EncodingJob, file: StreamedFile, name: str) -> None:
        self._job, self._file, self._name = job, file, name
        self._module = job.tables[name]
        try:
            self._encoder = TableEncoder(job.step_of(name), job.sources[name].memory_map())
        except CompressionError:
            # If a NaN or infinite weight is the cause, reading the blocks raises the error for it.
            for block in job.blocks(name):
                self._read_rows(block)
            raise

    def whole(self) -> list[Piece]:
        """Return the encoded tensors of the whole table, such as a codebook."""
        return [
            self._build_piece(tensor, values, 0) for tensor, values in self._encoder.whole().items()
        ]

    def __call__(self, block: Block) -> list[Piece]:
        encoded = self._encoder.encode(self._read_rows(block), block.begin)
        return [
            self._build_piece(tensor, values, entries.start)
            for tensor, (entries, values) in encoded.items()
        ]

    def _read_rows(self, block: Block) -> Tensor:
        rows = self._job.sources[self._name].read(block.begin, block.end).float()
        _check_finite(self._name, rows, block.begin)
        return rows

    def _build_piece(self, tensor: str, values: Tensor, begin: int) -> Piece:
        return self._file.piece(tensor_name(self._module, tensor), values, begin)


def _check_finite(name: str, rows: Tensor, begin: int) -> None:
    """Raise if a row of a block is NaN or infinite; ``begin`` is the number of its first row.

    Raises:
        ModelRefused: names the table and the row.
    """
    # The sum is fast, but it may overflow although every weight is finite. Then check each row.
    if math.isfinite(float(rows.sum())):
        return
    not_finite = (~torch.isfinite(rows)).any(dim=1)
    if bool(not_finite.any()):
        row = begin + int(not_finite.to(torch.uint8).argmax())
        raise ModelRefused("row_not_finite", row=row, table=name)
