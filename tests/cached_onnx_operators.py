"""Cache the lists of operators that torch creates at each ONNX export, to make tests faster.

The registry of ONNX operators takes 0.5 s, because torch parses the source of each operator. The
list of torch's composite operators takes 0.1 s, and each export creates it twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.export import decomp_utils, exported_program
from torch.onnx._internal.exporter import _registration as exporter


@contextmanager
def cache_onnx_operators() -> Iterator[None]:
    """In this context, every export uses a copy of the registry that the first export created.

    The list of composite operators is created again after an operator or a namespace is added.
    """
    create_registry = exporter.ONNXRegistry.from_torchlib
    registries: dict[int, exporter.ONNXRegistry] = {}

    def copy_registry(opset_version: int) -> exporter.ONNXRegistry:
        if opset_version not in registries:
            registries[opset_version] = create_registry(opset_version)
        registry = exporter.ONNXRegistry()
        registry._opset_version = opset_version
        registry.functions = {
            name: list(functions) for name, functions in registries[opset_version].functions.items()
        }
        return registry

    list_composite_operators = exported_program._collect_all_valid_cia_ops
    composite_operators: dict[tuple[int, int], set[Any]] = {}

    def cached_composite_operators() -> set[Any]:
        registrations = torch._C._dispatch_get_registrations_for_dispatch_key(
            "CompositeImplicitAutograd"
        )
        key = len(torch.ops._dir), len(registrations)
        if key not in composite_operators:
            composite_operators[key] = list_composite_operators()
        return composite_operators[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (decomp_utils, exported_program):
            patch.setattr(module, "_collect_all_valid_cia_ops", cached_composite_operators)
        patch.setattr(exporter.ONNXRegistry, "from_torchlib", staticmethod(copy_registry))
        yield
