"""Encode tables of any size block by block, from any source of rows to any sink of bytes.

The memory is that of a few row blocks for tables of any size. The stored bytes do not depend on the
number of rows per block or of threads: a row's place in the file follows from the format's layout,
and no stored entry belongs to rows of two blocks.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from compressors.contracts import ModuleRecord
from compressors.core.modules.formats import TensorSpec, blocks
from compressors.core.state.safetensors_stream import Piece, StreamedFile, size_of
from compressors.core.steps.step import TableStep
from compressors.core.steps.table_encoder import TableEncoder
from compressors.errors.compression import CompressionError, ModelRefused

BLOCK_BYTES = 2**22
"""Bytes of a block if the caller names no rows: block and codes fit in a core's cache."""


HEADER, WHOLE = "header", "whole"
"""Names of blocks that are not rows: the file's header, and what belongs to a whole table."""


class Source(Protocol):
    """A stored tensor that can be read piece by piece."""

    @property
    def spec(self) -> TensorSpec:
        """Its shape and type."""

    def read(self, begin: int, end: int) -> Tensor:
        """Read entries ``begin`` to ``end`` of the first dimension, or all of a scalar tensor.

        The result is valid only until the thread reads again.
        """

    def mapped(self) -> Tensor:
        """The full tensor, memory-mapped."""


class Sink(Protocol):
    """A destination of encoded blocks."""

    def holds(self, block: str) -> bool:
        """Whether an interrupted run has already written the block of this name."""

    def write(self, block: str, pieces: Sequence[Piece]) -> None:
        """Write the bytes of one block at their places; called from several threads."""


class Block(NamedTuple):
    """One unit of work: rows ``begin`` to ``end`` of the tensor called ``source``."""

    source: str
    begin: int
    end: int

    @property
    def name(self) -> str:
        """The name of the block in a sink."""
        return f"{self.source}@{self.begin}"


@dataclass(frozen=True)
class Job:
    """The plan for every tensor of a file: tables to encode, other tensors to copy.

    ``tables`` are encoded, each to the stored tensors ``MODULE.NAME``; the tensors of ``rest`` are
    copied unchanged under the same names.
    """

    step: TableStep
    tables: Mapping[str, str]
    """Tensor name -> the module its stored tensors belong to."""
    sources: Mapping[str, Source]
    block_rows: int | None = None

    @property
    def rest(self) -> list[str]:
        """The tensors that are copied unchanged."""
        return [name for name in self.sources if name not in self.tables]

    def stored(self, name: str) -> dict[str, TensorSpec]:
        """The stored tensors of one table, by their names in the format."""
        rows, dim = self.sources[name].spec.shape
        return self.step.storage.layout(rows, dim, self.step.settings())

    def layout(self) -> dict[str, TensorSpec]:
        """Every tensor of the result.

        Raises:
            ModelRefused: two tensors would have the same name.
        """
        specs = {name: self.sources[name].spec for name in self.rest}
        for name, module in self.tables.items():
            for part, spec in self.stored(name).items():
                whole = within(module, part)
                if whole in specs:
                    raise ModelRefused("tensor_name_taken", table=name, name=whole)
                specs[whole] = spec
        return specs

    def records(self) -> dict[str, ModuleRecord]:
        """The records to build a module from each encoded table, by the module's name."""
        settings = self.step.settings()
        return {
            module: ModuleRecord(
                kind="table",
                format=self.step.storage.name,
                settings={
                    "rows": self.sources[name].spec.shape[0],
                    "dim": self.sources[name].spec.shape[1],
                    **settings,
                },
            )
            for name, module in self.tables.items()
        }

    def blocks(self, name: str) -> Iterator[Block]:
        """The units of work of one tensor, in order."""
        spec = self.sources[name].spec
        rows = spec.shape[0] if spec.shape else 1
        most = max(BLOCK_BYTES * rows // max(size_of(spec), 1), 1)
        layout = {name: spec}
        if name in self.tables:
            most, layout = self.block_rows or most, self.stored(name)
        for begin, end in blocks(layout, rows, most):
            yield Block(name, begin, end)


def within(module: str, part: str) -> str:
    """The full name of a module's tensor."""
    return f"{module}.{part}" if module else part


def carry_out(
    job: Job,
    file: StreamedFile,
    sink: Sink,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encode or copy every tensor of a job into a file.

    Tables are fitted one after the other, so that the memory of only one fit is needed at a time;
    their blocks are encoded by several threads at once.

    Args:
        job: the plan for every tensor.
        file: the places of the tensors of ``job.layout`` in the file.
        sink: receives the bytes; blocks that it already has are not encoded again.
        workers: number of threads; by default one per core.
        progress: called with the number of bytes read for each block after it is written.

    Raises:
        ContractBroken: the encoded tensors do not match the step's layout.
        ModelRefused: a weight is NaN or infinite.
    """
    if not sink.holds(HEADER):
        sink.write(HEADER, [Piece(0, memoryview(file.header))])
    count = workers or len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    # Each thread encodes one block at a time: threads of torch within it would compete for cores.
    pool = ThreadPoolExecutor(count, "encode", initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[None]] = deque()
    try:
        with pool:
            try:
                for work in _works(job, file, sink, progress):
                    waiting.append(pool.submit(work))
                    if len(waiting) > 2 * count:
                        waiting.popleft().result()
                while waiting:
                    waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(before)


def _works(
    job: Job, file: StreamedFile, sink: Sink, progress: Callable[[int], None] | None
) -> Iterator[Callable[[], None]]:
    def work(block: Block, encode: Callable[[Block], list[Piece]]) -> Callable[[], None]:
        def run() -> None:
            if not sink.holds(block.name):
                sink.write(block.name, encode(block))
            if progress is not None:
                spec = job.sources[block.source].spec
                rows = spec.shape[0] if spec.shape else 1
                progress(size_of(spec) // max(rows, 1) * (block.end - block.begin))

        return run

    copying = _Copying(job, file)
    for name in job.rest:
        yield from (work(block, copying) for block in job.blocks(name))
    for name in job.tables:
        whole = f"{name}@{WHOLE}"
        if sink.holds(whole) and all(sink.holds(block.name) for block in job.blocks(name)):
            yield from (work(block, copying) for block in job.blocks(name))  # reports progress
            continue
        encoding = _Encoding(job, file, name)
        if not sink.holds(whole):
            sink.write(whole, encoding.whole())
        yield from (work(block, encoding) for block in job.blocks(name))


@dataclass(frozen=True)
class _Copying:
    job: Job
    file: StreamedFile

    def __call__(self, block: Block) -> list[Piece]:
        values = self.job.sources[block.source].read(block.begin, block.end)
        return [self.file.piece(block.source, values, block.begin)]


class _Encoding:
    """Encode one table: the constructor fits it, then blocks are encoded one by one."""

    def __init__(self, job: Job, file: StreamedFile, name: str) -> None:
        self._job, self._file, self._name = job, file, name
        self._module = job.tables[name]
        try:
            self._encoder = TableEncoder(job.step, job.sources[name].mapped())
        except CompressionError:
            # NaN or infinity may be the cause of the error: then report the row instead.
            for block in job.blocks(name):
                self._rows(block)
            raise

    def whole(self) -> list[Piece]:
        """The stored tensors that belong to the full table, such as a codebook."""
        return [self._piece(part, values, 0) for part, values in self._encoder.whole().items()]

    def __call__(self, block: Block) -> list[Piece]:
        encoded = self._encoder.encode(self._rows(block), block.begin)
        return [self._piece(part, values, at.start) for part, (at, values) in encoded.items()]

    def _rows(self, block: Block) -> Tensor:
        rows = self._job.sources[self._name].read(block.begin, block.end).float()
        _check_finite(self._name, rows, block.begin)
        return rows

    def _piece(self, part: str, values: Tensor, begin: int) -> Piece:
        return self._file.piece(within(self._module, part), values, begin)


def _check_finite(name: str, rows: Tensor, begin: int) -> None:
    # The sum is one pass over the block; it may also overflow where every weight is finite.
    if math.isfinite(float(rows.sum())):
        return
    bad = (~torch.isfinite(rows)).any(dim=1)
    if bool(bad.any()):
        row = begin + int(bad.to(torch.uint8).argmax())
        raise ModelRefused("row_not_finite", row=row, table=name)
