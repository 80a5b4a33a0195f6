"""Run recpress commands in forks of a process that has imported all libraries.

The imports are not repeated, so a run takes a second. Run as a script, this file is the fork
server: it reads one JSON request per line and writes one JSON response per line. It has no threads,
so forking is safe. Tests use its client, the class ``ForkServerClient``.

A *point* is a moment at which ``kill_points.py`` can kill a child process, such as the moment
before a change of a file or of the registry.
"""

import contextlib
import gc
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUN_SECONDS = 240.0
CRASHED = 77  # exit code after a Python exception that recpress did not convert to a message
# Modules that the fork server imports at its start; `run_and_preload` adds those of a command.
PRELOADED_MODULES = (
    "alembic",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "onnx",
    "onnxruntime",
    "pyarrow.parquet",
    "flows.cli.app",
    "flows.cli.console",
    "infra.registry.mlflow_registry",
    "tasks.promotion.promotions",
    "tasks.report.tables",
)
OPSETS = (18, 20, 21)  # ONNX opsets whose operators torch looks up during an export
UNKNOWN_ERROR = re.compile(r"^recpress: [\w.]*(Error|Exception|Warning|Interrupt): ", re.MULTILINE)
"""Start of the message for an exception of a library or of Python, such as ``KeyError``."""
MEASURED_ROUNDS = 20  # latency rounds instead of 1,000: the tests do not compare latencies


@dataclass(frozen=True)
class Call:
    """A function that a child process calls: ``module:name`` and its arguments."""

    path: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The work of one child process: commands in order, or one function call.

    Args:
        commands: arguments of ``recpress``, one tuple per command.
        call: a function to call instead of commands; ``Completed.value`` is its result.
        variables: environment variables, added to those of the server.
        fault: when to kill the process, passed to ``kill_points.arm``: at point number ``at``, or
            ``after`` seconds. A change of a file is a point only in the folder ``root``.
        memory: bytes that the child may allocate in addition to its current memory (RLIMIT_AS).
        file_bytes: largest file that the child may write (RLIMIT_FSIZE).
        seconds: time limit, after which the child is killed.
    """

    commands: tuple[tuple[str, ...], ...] = ()
    call: Call | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    fault: dict[str, Any] | None = None
    memory: int | None = None
    file_bytes: int | None = None
    seconds: float = RUN_SECONDS


@dataclass(frozen=True)
class Completed:
    """The result of one child process.

    Attributes:
        codes: exit code of each finished command.
        outputs: standard output of each finished command.
        messages: standard error of each finished command.
        signal: the signal that ended the process; 0 if none.
        seconds: wall time.
        cpu_seconds: CPU time.
        peak_mib: largest resident memory in MiB.
        value: result of the function of ``Job.call``.
        points: names of the points that the process passed; empty without ``Job.fault``.
        unfinished: output of the command that did not finish.
        timed_out: whether the process was killed at its time limit.
    """

    codes: tuple[int, ...]
    outputs: tuple[str, ...]
    messages: tuple[str, ...]
    signal: int
    seconds: float
    cpu_seconds: float
    peak_mib: int
    value: Any = None
    points: tuple[str, ...] = ()
    unfinished: str = ""
    timed_out: bool = False

    @property
    def code(self) -> int:
        """The exit code of the last command, or minus the signal that ended the process."""
        return -self.signal if self.signal else self.codes[-1]

    @property
    def text(self) -> str:
        """The last part of all output, for the message of a failing test."""
        return "\n".join((*self.outputs, *self.messages, self.unfinished))[-3000:]

    @property
    def crashed(self) -> bool:
        """Whether the run printed a traceback or an unknown error, or was ended by a signal."""
        printed = "\n".join((*self.messages, self.unfinished))
        has_traceback = "Traceback (most recent call last)" in printed
        has_unknown_error = UNKNOWN_ERROR.search(printed) is not None
        return self.signal != 0 or CRASHED in self.codes or has_traceback or has_unknown_error


class ForkServerClient:
    """Client of a running fork server.

    Args:
        process: the server.
        scratch: folder for the files of its child processes.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", scratch: Path) -> None:
        self._process, self._scratch = process, scratch

    def run(self, *commands: Sequence[str], **job: Any) -> Completed:
        """Run commands one after another in one child process; ``job`` are fields of ``Job``."""
        return self.run_jobs([Job(tuple(tuple(item) for item in commands), **job)])[0]

    def call(self, path: str, arguments: dict[str, Any], **job: Any) -> Completed:
        """Call a function in one child process; ``job`` are fields of ``Job``."""
        return self.run_jobs([Job(call=Call(path, arguments), **job)])[0]

    def run_and_preload(self, *commands: Sequence[str], **job: Any) -> Completed:
        """Run commands, then import their modules in the server, so that later runs start fast."""
        return self.run_jobs([Job(tuple(tuple(item) for item in commands), **job)], preload=True)[0]

    def run_jobs(self, jobs: Sequence[Job], *, preload: bool = False) -> list[Completed]:
        """Run each job in a separate child process; all jobs start at the same time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "scratch": str(self._scratch),
            "jobs": [asdict(job) for job in jobs],
            "preload": preload,
        }
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        response = self._process.stdout.readline()
        if not response:
            raise RuntimeError(f"the fork server ended with {self._process.wait()}")
        return [
            Completed(
                **{
                    key: tuple(v) if isinstance(v, list) and key != "value" else v
                    for key, v in item.items()
                }
            )
            for item in json.loads(response)
        ]


@contextmanager
def running_fork_server(variables: Mapping[str, str], scratch: Path) -> Iterator[ForkServerClient]:
    """Start the fork server, and stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        env=dict(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield ForkServerClient(process, scratch)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def serve() -> None:
    """Process requests until standard input ends."""
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of libraries does not mix with the responses
    import torch

    torch.set_num_threads(1)
    from cached_onnx_operators import cache_onnx_operators

    from flows.cli.console import EMBEDDED

    for name, value in EMBEDDED.items():  # settings of Prefect's logs that recpress sets
        os.environ.setdefault(name, value)
    for name in PRELOADED_MODULES:
        import_module(name)
    import_module("tasks.evaluation.latency").MAX_ROUNDS = MEASURED_ROUNDS
    with cache_onnx_operators():
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        for line in sys.stdin:
            request = json.loads(line)
            # Fill the cache of operators before forking, so that the children inherit it.
            for opset in OPSETS if request["preload"] else ():
                ONNXRegistry.from_torchlib(opset)
            results = _run_jobs(request)
            for result in results:
                modules = result.pop("modules", ())
                for name in modules if request["preload"] else ():
                    # Some modules fail if they are imported first; they are skipped.
                    with contextlib.suppress(Exception):
                        import_module(name)
            if request["preload"]:
                gc.collect()
                gc.freeze()  # children then copy fewer pages
            responses.write(json.dumps(results) + "\n")
            responses.flush()


def _run_jobs(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Run each job of a request in a fork, all at the same time; return their results."""
    scratch = Path(request["scratch"])
    scratch.mkdir(parents=True, exist_ok=True)
    start_reader, start_writer = os.pipe()
    started = time.monotonic()
    children: dict[int, tuple[int, dict[str, Any]]] = {}
    folders = []
    for number, job in enumerate(request["jobs"]):
        folder = scratch / f"child-{number}"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        folders.append(folder)
        pid = os.fork()
        if pid == 0:
            os.close(start_writer)
            os.setpgid(0, 0)
            os.read(start_reader, 1)  # returns when the parent closes its end
            _child(job, folder)
        children[pid] = (number, job)
    os.close(start_reader)
    os.close(start_writer)
    completed: dict[int, dict[str, Any]] = {}
    while len(completed) < len(children):
        for pid, (number, job) in children.items():
            if pid in completed:
                continue
            is_late = time.monotonic() - started > job["seconds"]
            if is_late:
                os.killpg(pid, signal.SIGKILL)
            ended_pid, status, usage = os.wait4(pid, 0 if is_late else os.WNOHANG)
            if ended_pid:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # also kills the processes that it started
                seconds = time.monotonic() - started
                completed[pid] = _result(folders[number], status, usage, seconds, is_late)
        if len(completed) < len(children):
            select.select([], [], [], 0.01)
    return [completed[pid] for pid in children]


def _result(
    folder: Path, status: int, usage: resource.struct_rusage, seconds: float, timed_out: bool
) -> dict[str, Any]:
    """Return the fields of ``Completed`` for a child process that has ended."""
    result_file = folder / "ended.json"
    result: dict[str, Any] = {"codes": [], "outputs": [], "messages": []}
    if result_file.exists():
        result = json.loads(result_file.read_text())
    count = len(result["codes"])
    unfinished = [folder / f"{count}.{name}" for name in ("out", "err")]
    return result | {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mib": usage.ru_maxrss >> 10,
        "timed_out": timed_out,
        "unfinished": "".join(
            path.read_bytes().decode(errors="replace") for path in unfinished if path.exists()
        ),
    }


def _child(job: dict[str, Any], folder: Path) -> None:
    """Run a job in this process and exit; never returns."""
    code = 0
    try:
        os.environ.update(job["variables"])
        import tempfile

        tempfile.tempdir = None  # so that it is read again, from this job's TMPDIR
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if any(name.startswith("PREFECT_") for name in job["variables"]):
            import_module("prefect.context").refresh_global_settings_context()
        if job["fault"] is not None:
            import_module("kill_points").arm(job["fault"], folder / "points.json")
        if job["memory"] is not None:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
                "SC_PAGESIZE"
            )
            limit = mapped + job["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if job["file_bytes"] is not None:
            _limit_files(job["file_bytes"])
            # A write beyond the limit then raises OSError instead of ending the process.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _run_job(job, folder)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _run_job(job: dict[str, Any], folder: Path) -> None:
    """Run the commands or the call of a job; write output and result to ``folder``."""
    codes: list[int] = []
    value = None
    before = set(sys.modules)
    for number in range(len(job["commands"]) or 1):  # one pass for a call, which has no commands
        out, error = (_open_output(folder / f"{number}.{stream}") for stream in ("out", "err"))
        os.dup2(out, 1)
        os.dup2(error, 2)
        os.close(out)
        os.close(error)
        if job["call"] is not None:
            module, _, name = job["call"]["path"].partition(":")
            try:
                value = getattr(import_module(module), name)(**job["call"]["arguments"])
                codes.append(0)
            except BaseException:
                traceback.print_exc()
                codes.append(CRASHED)
        else:
            codes.append(_run_command(job["commands"][number]))
        sys.stdout.flush()
        sys.stderr.flush()
    texts = {
        key: [
            (folder / f"{number}.{ending}").read_bytes().decode(errors="replace")
            for number in range(len(codes))
        ]
        for key, ending in (("outputs", "out"), ("messages", "err"))
    }
    points = folder / "points.json"
    if job["fault"] is not None:
        import_module("kill_points").save()
    result = {"codes": codes, "value": value, **texts}
    result["modules"] = sorted(set(sys.modules) - before)
    if points.exists():
        result["points"] = json.loads(points.read_text())
    # Remove the job's limit, which could be too small for the result.
    _limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    partial = folder / "ended.part"
    partial.write_text(json.dumps(result))
    partial.rename(folder / "ended.json")


def _limit_files(size: int) -> None:
    """Limit the size of files that this process may write."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def _open_output(path: Path) -> int:
    """Open an empty file for a command's output, and return its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)


def _run_command(arguments: Sequence[str]) -> int:
    """Run one recpress command in this process, and return its exit code."""
    from flows.cli import app

    sys.argv = ["recpress", *arguments]
    try:
        app.main()
    except SystemExit as end:
        # As in Python: exit code 0 for None, and 1 for a message.
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return CRASHED
    return 0


if __name__ == "__main__":
    sys.path[:0] = [
        str(HERE),
        *(str(HERE.parent / name) for name in ("", "tasks")),
        str(HERE.parents[1]),
    ]
    serve()
    os._exit(0)  # skips the interpreter's shutdown, which would take seconds
