"""What torch reads again for each export, and what does not change while tests run.

The sources of all of ONNX's operators take half a second, the list of its own composite operators,
which it makes twice, a tenth.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter import _registration as exporter


@contextmanager
def operators_read_once() -> Iterator[None]:
    """Inside, every export starts from a copy of the operators that the first one read.

    Composite operators are listed again once a namespace or one of them was added.
    """
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

    list_composite = exported_program._collect_all_valid_cia_ops
    listed: dict[tuple[int, int], set[Any]] = {}

    def composite() -> set[Any]:
        registered = torch._C._dispatch_get_registrations_for_dispatch_key(
            "CompositeImplicitAutograd"
        )
        key = len(torch.ops._dir), len(registered)
        if key not in listed:
            listed[key] = list_composite()
        return listed[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (decomp_utils, exported_program):
            patch.setattr(module, "_collect_all_valid_cia_ops", composite)
        patch.setattr(exporter.ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield
