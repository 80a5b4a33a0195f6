"""Interleaved timing of sessions, and the description of the machine. For every runtime."""

import contextlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts.targets.runtime import Machine, Session


def interleaved_ms(
    sessions: Sequence[Session],
    inputs: Mapping[str, NDArray[Any]],
    rounds: int,
    warmup: int = 20,
) -> tuple[NDArray[np.float32], ...]:
    """Measure milliseconds of each call on bound inputs, sessions in turn; one array per session.

    The sessions run A B A B ..., so that a machine that slows down slows all of them, and the
    n-th numbers belong together.
    """
    calls = [session.bound(inputs) for session in sessions]
    for call in calls:
        for _ in range(warmup):
            call()
    times = np.empty((len(sessions), rounds), dtype=np.float32)
    for turn in range(rounds):
        for index, call in enumerate(calls):
            begin = time.perf_counter_ns()
            call()
            times[index, turn] = (time.perf_counter_ns() - begin) / 1e6
    return tuple(times)


def machine(runtime: str, version: str, threads: int) -> Machine:
    """Return the description of this machine.

    Args:
        runtime: the runtime's name in sentences.
        version: version of its library.
        threads: number of threads of one call.
    """
    features = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return Machine(
        processor=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        runtime=runtime,
        version=version,
        threads=threads,
        int8_dot=bool({"avx512_vnni", "avx_vnni", "asimddp"} & features),
    )


def _cpuinfo(key: str) -> str:
    """Read one field of the first processor on Linux; empty on other systems."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
