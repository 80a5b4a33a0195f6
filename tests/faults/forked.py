"""Run commands in forks of one process that has imported everything, so one run takes a second.

Run as a script this file is that process: it reads one JSON request a line and answers each with
one JSON line. It has no threads, so forking it is safe. ``Forks`` is its client; tests use that.
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
CRASHED = 77  # exit code of a run that ended with an exception of Python instead of our message
# What every command needs; ``learn`` adds what one command imports besides.
IMPORTED = (
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
OPSETS = (18, 20, 21)  # whose operators an export reads
UNKNOWN = re.compile(r"^recpress: [\w.]*(Error|Exception|Warning|Interrupt): ", re.MULTILINE)
"""How the message of an exception begins that no class of ours describes."""
MEASURED_ROUNDS = 20  # of latency, instead of 1,000: no fault is in the numbers of milliseconds


@dataclass(frozen=True)
class Call:
    """A function to call in a child instead of a command: ``module:name`` and its arguments."""

    path: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one child does: its commands in order, or one call.

    Args:
        commands: arguments of ``recpress``, one list for each command.
        call: instead of commands, a function; what it returns is ``Ended.value``.
        variables: environment variables, added to those of the server.
        fault: passed to ``kill_points.arm`` before the work begins.
        memory: bytes that the child may allocate in addition to what it has (RLIMIT_AS).
        file_bytes: largest file that the child may write (RLIMIT_FSIZE).
        seconds: after this time the child is killed.
    """

    commands: tuple[tuple[str, ...], ...] = ()
    call: Call | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    fault: dict[str, Any] | None = None
    memory: int | None = None
    file_bytes: int | None = None
    seconds: float = RUN_SECONDS


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    ``codes``, ``outputs`` and ``messages`` have one entry for each command that finished; a
    command that was killed leaves only its ``signal`` and the text so far in ``unfinished``.
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
        """The exit code of the only command, or minus the signal that ended it."""
        return -self.signal if self.signal else self.codes[-1]

    @property
    def text(self) -> str:
        """All that was printed, for the message of a failing test."""
        return "\n".join((*self.outputs, *self.messages, self.unfinished))[-3000:]

    @property
    def crashed(self) -> bool:
        """Whether a traceback was shown, an unknown error was named or a signal ended it."""
        shown = "\n".join((*self.messages, self.unfinished))
        known = "Traceback (most recent call last)" not in shown and not UNKNOWN.search(shown)
        return self.signal != 0 or CRASHED in self.codes or not known


class Forks:
    """A running server of forks."""

    def __init__(self, process: "subprocess.Popen[bytes]", scratch: Path) -> None:
        self._process, self._scratch = process, scratch

    def run(self, *commands: Sequence[str], **job: Any) -> Ended:
        """Run commands one after another in one child."""
        return self.together([Job(tuple(tuple(item) for item in commands), **job)])[0]

    def call(self, path: str, arguments: dict[str, Any], **job: Any) -> Ended:
        """Call a function of a module in one child."""
        return self.together([Job(call=Call(path, arguments), **job)])[0]

    def learn(self, *commands: Sequence[str], **job: Any) -> Ended:
        """Run commands, then import all they imported into the server, so later runs are quick."""
        return self.together([Job(tuple(tuple(item) for item in commands), **job)], learn=True)[0]

    def together(self, jobs: Sequence[Job], *, learn: bool = False) -> list[Ended]:
        """Run each job in a child of its own, all started at the same moment."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "scratch": str(self._scratch),
            "jobs": [asdict(job) for job in jobs],
            "learn": learn,
        }
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of forks ended with {self._process.wait()}")
        return [
            Ended(
                **{
                    key: tuple(v) if isinstance(v, list) and key != "value" else v
                    for key, v in item.items()
                }
            )
            for item in json.loads(answer)
        ]


@contextmanager
def running_forks(variables: Mapping[str, str], scratch: Path) -> Iterator[Forks]:
    """Start the server; stop it, by its own pid, at the end."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        env=dict(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Forks(process, scratch)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints while it is imported is no answer
    import torch

    torch.set_num_threads(1)
    from onnx_operators import operators_read_once

    from flows.cli.console import EMBEDDED

    for name, value in EMBEDDED.items():
        os.environ.setdefault(name, value)
    for name in IMPORTED:
        import_module(name)
    import_module("tasks.measure").MOST_ROUNDS = MEASURED_ROUNDS
    with operators_read_once():
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        for line in sys.stdin:
            request = json.loads(line)
            for opset in OPSETS if request["learn"] else ():
                ONNXRegistry.from_torchlib(opset)
            results = _together(request)
            for result in results:
                modules = result.pop("modules", ())
                for name in modules if request["learn"] else ():
                    with contextlib.suppress(Exception):  # some are made while others are imported
                        import_module(name)
            if request["learn"]:
                gc.collect()
                gc.freeze()  # children then copy fewer pages
            answers.write(json.dumps(results) + "\n")
            answers.flush()


def _together(request: dict[str, Any]) -> list[dict[str, Any]]:
    scratch = Path(request["scratch"])
    scratch.mkdir(parents=True, exist_ok=True)
    start, begin = os.pipe()
    began = time.monotonic()
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
            os.close(begin)
            os.setpgid(0, 0)
            os.read(start, 1)  # returns when the parent closes its end
            _child(job, folder)
        children[pid] = (number, job)
    os.close(start)
    os.close(begin)
    ended: dict[int, dict[str, Any]] = {}
    while len(ended) < len(children):
        for pid, (number, job) in children.items():
            if pid in ended:
                continue
            late = time.monotonic() - began > job["seconds"]
            if late:
                os.killpg(pid, signal.SIGKILL)
            got, status, used = os.wait4(pid, 0 if late else os.WNOHANG)
            if got:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what it started ends with it
                seconds = time.monotonic() - began
                ended[pid] = _result(folders[number], status, used, seconds, late)
        if len(ended) < len(children):
            select.select([], [], [], 0.01)
    return [ended[pid] for pid in children]


def _result(
    folder: Path, status: int, used: resource.struct_rusage, seconds: float, late: bool
) -> dict[str, Any]:
    done = folder / "ended.json"
    result: dict[str, Any] = {"codes": [], "outputs": [], "messages": []}
    if done.exists():
        result = json.loads(done.read_text())
    count = len(result["codes"])
    rest = [folder / f"{count}.{name}" for name in ("out", "err")]
    return result | {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
        "peak_mib": used.ru_maxrss >> 10,
        "timed_out": late,
        "unfinished": "".join(
            path.read_bytes().decode(errors="replace") for path in rest if path.exists()
        ),
    }


def _child(job: dict[str, Any], folder: Path) -> None:
    """Do a job in this process and end it; never returns."""
    code = 0
    try:
        os.environ.update(job["variables"])
        import tempfile

        tempfile.tempdir = None
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if any(name.startswith("PREFECT_") for name in job["variables"]):
            import_module("prefect.context").refresh_global_settings_context()
        if job["fault"] is not None:
            import_module("kill_points").arm(job["fault"], folder / "points.json")
        if job["memory"] is not None:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
                "SC_PAGESIZE"
            )
            most = mapped + job["memory"]
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        if job["file_bytes"] is not None:
            _limit_files(job["file_bytes"])
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _work(job, folder)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _work(job: dict[str, Any], folder: Path) -> None:
    codes: list[int] = []
    value = None
    before = set(sys.modules)
    for number in range(len(job["commands"]) or 1):
        out, error = (
            _redirected(stream, folder / f"{number}.{stream}") for stream in ("out", "err")
        )
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
            codes.append(_command(job["commands"][number]))
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
    _limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    partial = folder / "ended.part"
    partial.write_text(json.dumps(result))
    partial.rename(folder / "ended.json")


def _limit_files(size: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def _redirected(stream: str, path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)


def _command(arguments: Sequence[str]) -> int:
    from flows.cli import app

    sys.argv = ["recpress", *arguments]
    try:
        app.main()
    except SystemExit as end:
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
    os._exit(0)  # the interpreter would take seconds to take down all it imported
