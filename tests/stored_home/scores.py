"""Compute the scores of stored bundles and graphs on fixed inputs, and describe the environment.

The stored home is a folder of this repository with bundles and graphs that an earlier version
wrote, their scores, and the environment in which they were computed. Tests compare those scores
with the scores that today's code computes.

The last bits of a score depend on the order of float sums, and so on the kernels that torch, MKL
and ONNX Runtime choose for the processor. ``environment`` returns the processor and the library
versions. If they equal the stored environment, scores must be equal bit by bit. Measured on one
processor: torch's kernels for AVX2 and AVX-512 give equal bits in all 93 bundles; its kernels for
SSE give different last bits in 73.

In other environments a rounding tolerance applies (``stored.py``). If a layer quantizes its inputs
to int8 or float8, the tolerance is the one between a module and its graph
(``compressors/lower/comparison/parity.py``). Tensors are always compared bit by bit.
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
    """Return the processor and the library versions that determine the last bits of a score.

    ``processor`` is the SHA-256 of the processor's feature flags.
    """
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
    """Compute the scores of a loaded bundle, float32 ``(rows,)``."""
    with _one_thread(), torch.no_grad():
        scores: Tensor = module(**inputs)
    return scores.reshape(-1).numpy()


def graph_scores(path: Path, names: tuple[str, ...], inputs: Mapping[str, Tensor]) -> FloatArray:
    """Compute the scores of a stored graph in ONNX Runtime, or the vectors of a tower's graph.

    Args:
        path: the ONNX file.
        names: names of the graph's inputs.
        inputs: inputs of the whole model, by name.
    """
    return Session(path, threads=1).scores({name: inputs[name].numpy() for name in names})


def out_of_range_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with some ids outside their tables, to cover the policy for such ids."""
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    changed["user"][0] = CLICK_CONFIG["users"]
    changed["item"][1] = -1
    changed["item"][2] = CLICK_CONFIG["items"] + 7
    return changed


def tensors_digest(module: nn.Module) -> str:
    """Hash dtype, shape and bytes of all tensors of a module, independent of their names."""
    descriptions = []
    for tensor in module.state_dict().values():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        description = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()]
        descriptions.append(json.dumps(description))
    return hashlib.sha256("\n".join(sorted(descriptions)).encode()).hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch with one thread in the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
