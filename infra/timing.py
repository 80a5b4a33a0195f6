"""Measure the latency of models on any runtime, and describe the machine.

A session is one model loaded in a runtime, such as ONNX Runtime.
"""

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


def measure_interleaved_ms(
    sessions: Sequence[Session],
    inputs: Mapping[str, NDArray[Any]],
    rounds: int,
    warmup: int = 20,
) -> tuple[NDArray[np.float32], ...]:
    """Measure the latency of several sessions on the same inputs.

    The sessions run in the order A B A B ..., so that a machine that slows down affects all of
    them, and times with the same index can be compared as pairs. The inputs are bound to each
    session before the measurement.

    Args:
        sessions: the sessions to compare; ``bind`` returns a function that runs one call.
        inputs: one array per input name.
        rounds: number of measured calls of each session.
        warmup: number of calls of each session before the measurement; the first calls are slower.

    Returns:
        float32 (rounds,) per session: the duration of each call in milliseconds.
    """
    calls = [session.bind(inputs) for session in sessions]
    for call in calls:
        for _ in range(warmup):
            call()
    times = np.empty((len(sessions), rounds), dtype=np.float32)
    for measurement in range(rounds):
        for index, call in enumerate(calls):
            start = time.perf_counter_ns()
            call()
            times[index, measurement] = (time.perf_counter_ns() - start) / 1e6
    return tuple(times)


def describe_machine(runtime: str, version: str, threads: int) -> Machine:
    """Describe this machine and the runtime of a measurement.

    Args:
        runtime: name of the runtime for people, such as ``ONNX Runtime``.
        version: version of the runtime's library.
        threads: number of threads that one call uses.
    """
    # /proc/cpuinfo lists the instruction sets of x86 as "flags" and those of ARM as "Features".
    features = set((_read_cpuinfo("flags") or _read_cpuinfo("Features")).split())
    return Machine(
        processor=_read_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        runtime=runtime,
        version=version,
        threads=threads,
        # Whether the processor has instructions for dot products of int8 vectors.
        int8_dot=bool({"avx512_vnni", "avx_vnni", "asimddp"} & features),
    )


def _read_cpuinfo(key: str) -> str:
    """Read a field of ``/proc/cpuinfo`` for the first processor; empty on other systems."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
