"""torch reads the sources of all of ONNX's operators for each export: half a second of two."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch.onnx._internal.exporter import _registration as exporter


@contextmanager
def operators_read_once() -> Iterator[None]:
    """Inside, every export starts from a copy of the operators that the first one read."""
    read = exporter.ONNXRegistry.from_torchlib
    known: dict[int, exporter.ONNXRegistry] = {}

    def copied(opset_version: int) -> exporter.ONNXRegistry:
        if opset_version not in known:
            known[opset_version] = read(opset_version)
        registry = exporter.ONNXRegistry()
        registry._opset_version = opset_version
        registry.functions = {
            name: list(functions) for name, functions in known[opset_version].functions.items()
        }
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter.ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield
