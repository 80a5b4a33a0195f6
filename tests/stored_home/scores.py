"""Scores of stored bundles and graphs on fixed inputs, and where they must be equal in every bit.

Float sums are ordered by the instruction set: torch, MKL and ONNX Runtime choose kernels when they
start. ``environment`` names the processor and the libraries; where both are as they were, scores
are compared bit by bit. Measured on one processor: torch's kernels for AVX2 and AVX-512 give equal
bits in all 93 bundles, those for SSE other last bits in 73. Elsewhere rounding is allowed
(``stored.py``), and where a layer rounds its inputs to int8 or float8, what the product allows
between a module and its graph (``compressors/lower/parity.py``). Tensors are compared bit by bit
everywhere.
"""

import functools
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infra.onnxruntime.sessions import Session
from tests.stored_home.drafts import CLICK_CONFIG

FloatArray = NDArray[np.float32]


@functools.cache
def environment() -> dict[str, str]:
    """The processor and the libraries that decide the last bits of a score."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return {
        "machine": platform.machine(),
        "processor": hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }


def module_scores(module: nn.Module, inputs: Mapping[str, Tensor]) -> FloatArray:
    """Scores float32 ``(rows,)`` of a loaded bundle."""
    with _one_thread(), torch.no_grad():
        scores: Tensor = module(**inputs)
    return scores.reshape(-1).numpy()


def graph_scores(path: Path, names: tuple[str, ...], inputs: Mapping[str, Tensor]) -> FloatArray:
    """Scores or vectors of a stored graph in ONNX Runtime.

    Args:
        path: the ONNX file.
        names: its inputs.
        inputs: of the whole model, by name.
    """
    return Session(path, threads=1).scores({name: inputs[name].numpy() for name in names})


def edge_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with ids outside their tables: what a graph does with them is stored too."""
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    changed["user"][0] = CLICK_CONFIG["users"]
    changed["item"][1] = -1
    changed["item"][2] = CLICK_CONFIG["items"] + 7
    return changed


def tensors_digest(module: nn.Module) -> str:
    """SHA-256 over type, shape and bytes of all tensors of a module, whatever their names."""
    found = []
    for tensor in module.state_dict().values():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        fact = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()]
        found.append(json.dumps(fact))
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
