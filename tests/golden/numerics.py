"""Describe a tensor in one line of text, and compare such lines across CPUs.

A line has dtype, shape, a digest of the values, and two statistics: mean and root mean square. For
a tensor of at most one element it has dtype, shape and the value instead.

On the machine type that wrote the record the whole line must be equal. On another machine type
float sums have another order, so the digest may differ; then dtype and shape must be equal and the
statistics must be close.
"""

import hashlib
import math
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

# CPU features that change the order or the rounding of float sums in torch, MKL, OpenBLAS, LLVM
# and MLAS.
FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile",
    "amx_int8",
)  # fmt: skip
LIBRARIES = ("torch", "numpy", "scipy", "numba", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
LINE = re.compile(r"(?P<type>\S+) (?P<digest>[0-9a-f]{16}) mean (?P<mean>\S+) rms (?P<rms>\S+)")


def describe_machine() -> dict[str, str]:
    """Return properties that may change last bits: CPU vendor and features, library versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    entries = [line.partition(":") for line in lines]
    # Reversed, so that the values of the first processor remain.
    values = {key.strip(): value.strip() for key, _, value in reversed(entries)}
    flags = set(values.get("flags", "").split())
    features = " ".join(flag for flag in FLAGS if flag in flags)
    cpu = f"{values.get('vendor_id', 'unknown')}, {features}"
    libraries = {name: version(name).partition("+")[0] for name in LIBRARIES}
    return {"cpu": f"{cpu}, torch {torch.backends.cpu.get_cpu_capability()}", **libraries}


def digest(content: bytes) -> str:
    """Return the first 16 digits of a sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def format_line(
    kind: str, content: bytes, shape: tuple[int, ...], values: NDArray[np.float64]
) -> str:
    """Return one line that describes a tensor.

    Args:
        kind: its dtype.
        content: its bytes.
        shape: its shape.
        values: its values as float64; for packed types, the values of its bytes.
    """
    title = f"{kind}[{','.join(map(str, shape))}]"
    finite = values[np.isfinite(values)]
    if values.size <= 1:
        return f"{title} = {' '.join(repr(float(value)) for value in values.reshape(-1))}"
    mean = float(finite.mean()) if finite.size else 0.0
    rms = math.sqrt(float((finite**2).mean())) if finite.size else 0.0
    return f"{title} {digest(content)} mean {mean:.5g} rms {rms:.5g}"


def format_array(array: NDArray[np.generic]) -> str:
    """Return one line that describes scores; all NaNs are treated as equal."""
    array = np.where(np.isnan(array), np.float32("nan"), array).astype(np.float32)
    return format_line("float32", array.tobytes(), array.shape, array.astype(np.float64))


def format_tensor(tensor: torch.Tensor) -> str:
    """Return one line that describes a stored tensor."""
    contiguous = tensor.detach().contiguous()
    content = (
        contiguous.reshape(-1).view(torch.uint8).numpy().tobytes() if contiguous.numel() else b""
    )
    kind = str(contiguous.dtype).removeprefix("torch.")
    return format_line(kind, content, tuple(contiguous.shape), contiguous.to(torch.float64).numpy())


def is_near(expected: str, actual: str, tolerance: float) -> bool:
    """Return whether dtypes and shapes are equal and statistics differ by at most a tolerance.

    ``tolerance`` is a share of the root mean square of the expected tensor.
    """
    first, second = LINE.fullmatch(expected), LINE.fullmatch(actual)
    if first is None or second is None:
        return _are_scalars_near(expected, actual, tolerance)
    if first["type"] != second["type"]:
        return False
    allowed = tolerance * max(float(first["rms"]), 1e-12)
    return all(abs(float(first[name]) - float(second[name])) <= allowed for name in ("mean", "rms"))


def get_type_and_shape(line: str) -> str:
    """Return the dtype and shape in a line."""
    return line.partition(" ")[0]


def is_scalar(line: str) -> bool:
    """Return whether a line describes a tensor of one float, and so contains its value."""
    return line.startswith(("float", "bfloat")) and " = " in line


def _are_scalars_near(expected: str, actual: str, tolerance: float) -> bool:
    if not is_scalar(expected) or get_type_and_shape(expected) != get_type_and_shape(actual):
        return expected == actual
    first, second = (float(line.partition(" = ")[2]) for line in (expected, actual))
    return math.isclose(first, second, rel_tol=tolerance, abs_tol=1e-12)
