"""Cache lists of operators that torch reads again for each ONNX export, to make tests faster.

Reading the sources of all ONNX operators takes 0.5 s, and the list of torch's composite operators,
which an export creates twice, takes 0.1 s.
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
    """Within this context, every export uses a copy of the operators that the first one read.

    Composite operators are listed again after an operator or a namespace was added.
    """
    original = exporter.ONNXRegistry.from_torchlib
    registries: dict[int, exporter.ONNXRegistry] = {}

    def copy_of_registry(opset_version: int) -> exporter.ONNXRegistry:
        if opset_version not in registries:
            registries[opset_version] = original(opset_version)
        registry = exporter.ONNXRegistry()
        registry._opset_version = opset_version
        registry.functions = {
            name: list(functions) for name, functions in registries[opset_version].functions.items()
        }
        return registry

    list_composite_operators = exported_program._collect_all_valid_cia_ops
    listings: dict[tuple[int, int], set[Any]] = {}

    def cached_composite_operators() -> set[Any]:
        registered = torch._C._dispatch_get_registrations_for_dispatch_key(
            "CompositeImplicitAutograd"
        )
        key = len(torch.ops._dir), len(registered)
        if key not in listings:
            listings[key] = list_composite_operators()
        return listings[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (decomp_utils, exported_program):
            patch.setattr(module, "_collect_all_valid_cia_ops", cached_composite_operators)
        patch.setattr(exporter.ONNXRegistry, "from_torchlib", staticmethod(copy_of_registry))
        yield
