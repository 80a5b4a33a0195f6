"""Inspect parquet files in a child process that runs ``parquet_inspection.py``.

The child is started for the first file and used for later files, because a start takes a third
of a second. A file that crashes the child or exceeds its limits is refused, and the next file is
inspected by a new child.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic import ValidationError

from compressors.contracts import Frozen
from infra.bundle.json_reader import escape_message
from infra.data.parquet_inspection import MEMORY_LIMIT
from infra.errors import ChildFailed, DataRefused, OutOfMemory
from infra.store.disk import translate_input_error

START_SECONDS = 120.0  # time limit for the start of the child
SECONDS = 60.0
BYTES_PER_SECOND = 4 * 2**20
"""The time limit of a file is ``SECONDS`` plus its size divided by ``BYTES_PER_SECOND``.

Reading 100 MiB usually takes one second.
"""

MAX_RESPONSE_BYTES = 16 * 2**20
MAX_CACHED_FILES = 1024
"""Number of files whose counts are kept in memory."""


class Inspected(Frozen):
    """The counts of one file, as ``parquet_inspection.inspect`` returns them.

    Attributes:
        rows: number of rows.
        kinds: name and type of every column.
        values: number of values of each column that was read.
        longest: length of the longest list of each column that was read.
        batch_rows: rows per batch to read the file with.
    """

    rows: int
    kinds: tuple[tuple[str, str], ...]
    values: dict[str, int]
    longest: dict[str, int]
    batch_rows: int


class _Identity(NamedTuple):
    """Identifies a file, its status and the columns to read; it changes if the file is written.

    ``modified`` and ``changed`` are the times, in nanoseconds, of the last change of the content
    (mtime) and of the status (ctime).
    """

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int
    columns: tuple[str, ...]


class _ChildEnded(Exception):
    """The child process ended before it responded."""


class _Child:
    """One running child process; ``memory`` is the number of bytes that it may allocate."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close_pipes
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
            "ARROW_DEFAULT_MEMORY_POOL": "system",  # other pools reserve unused memory
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-m", "infra.data.parquet_inspection"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            bufsize=0,
            start_new_session=True,
        )
        self._received = b""
        try:
            self.memory: int = self.read_response(START_SECONDS)["memory"]
        except BaseException:
            self.end()
            raise

    def request(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request, wait for the response and return it.

        Args:
            request: path of the file and names of the columns.
            seconds: time limit.

        Raises:
            _ChildEnded: the child ended before it responded.
            TimeoutError: the child did not respond in time.
        """
        line = json.dumps(request | {"seconds": seconds}).encode() + b"\n"
        try:
            self._require_pipe(self._process.stdin).write(line)
        except BrokenPipeError as fault:
            raise _ChildEnded from fault
        return self.read_response(seconds)

    def read_response(self, seconds: float) -> dict[str, Any]:
        """Read one line from the child and decode it.

        Raises:
            _ChildEnded: the child ended before it responded.
            TimeoutError: the child did not respond in ``seconds``.
        """
        out = self._require_pipe(self._process.stdout)
        end = time.monotonic() + seconds
        while b"\n" not in self._received:
            ready, _, _ = select.select([out], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            data = os.read(out.fileno(), 2**16)
            if not data or len(self._received) > MAX_RESPONSE_BYTES:
                raise _ChildEnded
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value

    def end(self) -> int:
        """Kill the child if it still runs, and return its exit code."""
        if (code := self._process.poll()) is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=0.2)  # a child that is ending has its exit code
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.close_pipes()
        return self._process.wait() if code is None else code

    def close_pipes(self) -> None:
        """Close this process's ends of the pipes; the child then ends, because its input ends."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()

    def last_output(self) -> str:
        """Return the last line that the child printed."""
        self._log.seek(0)
        lines = self._log.read()[-4096:].decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    @staticmethod
    def _require_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None:  # impossible, because both are pipes; for the type checker
            raise _ChildEnded
        return pipe


def _build_refusal(file: str, code: str, fields: dict[str, Any]) -> DataRefused:
    """Build the error for a file that the child refused, from the code and fields it sent."""
    if code == "too_many_columns":
        return DataRefused(
            "too_many_columns",
            file=file,
            columns=fields["columns"],
            characters=fields["characters"],
            most_columns=fields["most_columns"],
            most_characters=fields["most_characters"],
        )
    if code == "footer_rows_differ":
        return DataRefused(
            "footer_rows_differ", file=file, expected=fields["expected"], got=fields["got"]
        )
    if code == "expands_too_far":
        return DataRefused(
            "expands_too_far", file=file, most_bytes=fields["most_bytes"], factor=fields["factor"]
        )
    return DataRefused("unreadable", file=file, problem=escape_message(fields["problem"]))


class Inspector:
    """Inspects files one after another with one child process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._counts_by_identity: dict[_Identity, Inspected] = {}

    def inspect(self, file: Path, columns: Iterable[str]) -> Inspected:
        """Read columns of a file to its end in the child process, and return the counts.

        A file that has not changed since its last inspection is not read again.

        Args:
            file: path of a parquet file.
            columns: names of the columns to read; names that the file lacks are skipped.

        Raises:
            DataRefused: the file is damaged, or exceeds a limit of memory, time or expansion.
            FileRefused: the file cannot be opened.
            OutOfMemory: this process or machine has less memory than a file may use.
            ChildFailed: the child process could not be started.
        """
        names = tuple(dict.fromkeys(columns))
        try:
            status = file.stat()
        except OSError as fault:
            raise translate_input_error(fault, file) from fault
        identity = _Identity(
            str(file.absolute()),
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            names,
        )
        with self._lock:
            if identity not in self._counts_by_identity:
                counts = self._inspect(file, names, SECONDS + status.st_size / BYTES_PER_SECOND)
                if len(self._counts_by_identity) >= MAX_CACHED_FILES:
                    self._counts_by_identity.clear()
                self._counts_by_identity[identity] = counts
            return self._counts_by_identity[identity]

    def _inspect(self, file: Path, columns: tuple[str, ...], seconds: float) -> Inspected:
        """Inspect a file in the child process; raise the error that the response describes."""
        child = self._get_child()
        try:
            response = child.request({"file": str(file.absolute()), "columns": columns}, seconds)
        except TimeoutError as fault:
            self._end_child()
            raise DataRefused("reader_timed_out", file=str(file), seconds=seconds) from fault
        except _ChildEnded as fault:
            message = child.last_output()
            raise self._build_ended_error(file, self._end_child(), message) from fault
        if "refused" in response:
            raise _build_refusal(str(file), **response["refused"])
        if "memory" in response:
            if child.memory < MEMORY_LIMIT:
                raise OutOfMemory(
                    "reader_memory", file=str(file), available_mib=child.memory / 2**20
                )
            raise DataRefused("reader_memory", file=str(file), most_mib=MEMORY_LIMIT // 2**20)
        if "errno" in response:
            error = OSError(response["errno"], os.strerror(response["errno"]), str(file))
            raise translate_input_error(error)
        try:
            return Inspected.model_validate(response)
        except ValidationError as fault:
            raise DataRefused("not_parquet", file=str(file)) from fault

    def _build_ended_error(self, file: Path, code: int, message: str) -> DataRefused | OutOfMemory:
        """Return the error for a file whose inspection ended the child.

        Args:
            file: the file.
            code: exit code of the child; negative for a signal.
            message: the last line that the child printed.
        """
        if code == -signal.SIGKILL:  # the kernel kills processes when memory is exhausted
            return OutOfMemory("reader_killed", file=str(file))
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not message:
            return DataRefused("reader_ended", file=str(file), cause=cause)
        return DataRefused(
            "reader_ended_with_message",
            file=str(file),
            cause=cause,
            message=escape_message(message),
        )

    def _get_child(self) -> _Child:
        """Return the child process; start one if there is none."""
        if self._child is None:
            try:
                self._child = _Child()
            except (_ChildEnded, TimeoutError, OSError) as fault:
                raise ChildFailed("reader_not_started") from fault
        return self._child

    def _end_child(self) -> int:
        """End the child process, and return its exit code; 0 if there is none."""
        child, self._child = self._child, None
        return 0 if child is None else child.end()

    def close(self) -> None:
        """End the child process, if there is one."""
        self._end_child()

    def after_fork(self) -> None:
        """Discard the child process in a forked process, because it belongs to the parent."""
        self._lock = threading.Lock()
        if self._child is not None:
            self._child.close_pipes()
            self._child = None


_inspector = Inspector()
atexit.register(_inspector.close)
os.register_at_fork(after_in_child=_inspector.after_fork)


def inspect_parquet(file: Path, columns: Iterable[str]) -> Inspected:
    """Call ``Inspector.inspect`` of the inspector that all callers of this process share."""
    return _inspector.inspect(file, columns)
