"""Checks of one random network: mixed formats on one target, single formats, and single steps.

The imported dicts of ``steps.py`` return a step by its kind: ``TABLES`` and ``LAYERS`` for formats,
``VALUES`` for steps that change values instead of formats, and ``LAST`` for steps after all others.
``COMPOSING`` are kinds that replace a table by smaller tables, ``TRAINS`` kinds that also train.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from compressors.contracts import TargetName
from compressors.core.model import Model
from compressors.core.units import Unit, swap
from tests.random_networks.check import Checker, list_float32_units
from tests.random_networks.inputs import replace_invalid_ids
from tests.random_networks.steps import COMPOSING, LAST, LAYERS, TABLES, TARGETS, TRAINS, VALUES

PLAIN_EVERY = 10
"""Every tenth network is also lowered without compression."""
VALUE_STEPS = 1
"""Number of value-changing steps that are checked alone on each network."""
SUPERVISED = ("drop_layers", "l1_training", "fine_tune", "distill")
"""Value-changing steps that this test does not apply to retrieval models."""
SLOW = ("additive_codes", "neural_codes", "qat", "table_qat")
"""Formats that are checked alone only on every fourth network, to save time."""


def check_mixed_formats(checker: Checker, number: int, target: TargetName | None) -> Model:
    """Apply some value-changing steps, then a different format to each group of units, and lower.

    Args:
        checker: the checker of the network.
        number: number of the pass; it changes the assignment of formats to units.
        target: the target to lower for; None checks the module only.

    Returns:
        The compressed model.
    """
    rng = random.Random(f"pass {checker.case.seed} {number}")
    model = checker.source
    retrieval = checker.case.signature.single_output.kind == "retrieval"
    values = rng.sample(sorted(VALUES), rng.choice((0, 1, 1, 1, 2)))
    for name in values:
        if not (retrieval and name in SUPERVISED):
            model = checker.apply_step(VALUES[name](rng), model) or model
    plain = model
    called = set(find_called_units(checker))
    # A step may refuse the other units if it names them, so only a tenth of them is included.
    tables, layers = (
        [n for n in names if n in called or rng.random() < 0.1]
        for names in list_float32_units(plain)
    )
    kinds = [kind for kind in _kinds(TABLES, retrieval) if kind not in TRAINS]
    for kind, names in assign_formats(rng, tables, kinds, checker.case.seed + number):
        model = checker.apply_step(TABLES[kind](rng, names), model) or model
        if kind in COMPOSING and rng.random() < 0.7:
            # The smaller tables that replaced these tables get a format too.
            parts = [u.name for u in Unit.of(model.module) if u.part_of in names]
            part_kind = rng.choice(
                ("rowwise_int8", "rowwise_int4", "float16", "kmeans", "bfloat16")
            )
            if parts:
                model = checker.apply_step(TABLES[part_kind](rng, tuple(parts)), model) or model
    kinds = [kind for kind in _kinds(LAYERS, retrieval) if kind not in TRAINS]
    for kind, names in assign_formats(rng, layers, kinds, checker.case.seed + number):
        model = checker.apply_step(LAYERS[kind](rng, names), model) or model
    where = f"pass {number} ({', '.join(values)})"
    checker.run_guarded(where, lambda: checker.check_module(model, plain, where))
    if rng.random() < 0.2 and not retrieval:
        model = checker.apply_step(LAST[rng.choice(sorted(LAST))](rng), model) or model
    if target is not None:
        checker.check_lowering(model, target, where)
    return model


def _kinds(draws: dict[str, Any], retrieval: bool) -> list[str]:
    """Return the kinds in ``draws``; if ``retrieval``, without those that are not tested on it."""
    excluded = {*TRAINS, "additive_codes", "drop_tables"} if retrieval else set()
    return sorted(draws.keys() - excluded)


def assign_formats(
    rng: random.Random, units: Sequence[str], kinds: Sequence[str], first: int
) -> list[tuple[str, tuple[str, ...]]]:
    """Assign formats to units, and leave some units in float32.

    Args:
        rng: shuffles the units and selects those that stay in float32.
        units: names of tables or layers.
        kinds: kinds of the steps that apply a format; units receive them in turn.
        first: selects the kind of the first unit, at index ``3 * first``; over a range of numbers,
            every kind is used.

    Returns:
        Each used kind with the names of its units.
    """
    shuffled = rng.sample(list(units), len(units))
    units_by_format: dict[str, list[str]] = {}
    for index, unit in enumerate(shuffled):
        if rng.random() < 0.12:
            continue  # keeps float32
        units_by_format.setdefault(kinds[(first * 3 + index) % len(kinds)], []).append(unit)
    return [(kind, tuple(names)) for kind, names in units_by_format.items()]


@torch.no_grad()
def find_called_units(checker: Checker) -> tuple[str, ...]:
    """Return the units that the network calls and whose weights it reads in no other way."""
    rows = replace_invalid_ids(checker.case.signature, checker.tables, checker.rows["typical"])[0]
    names = []
    for unit in Unit.of(checker.source.module):
        # ``private`` copies the modules and shares their tensors, so ``source`` does not change.
        model = checker.source.private().module
        wrapper = _WithoutWeights(unit.module)
        swap(model, unit.name, wrapper)
        try:
            model(**rows)
        except (AttributeError, TypeError, RuntimeError):
            continue
        if wrapper.calls and unit.shared_with is None:
            names.append(unit.name)
    return tuple(names)


class _WithoutWeights(nn.Module):
    """Wraps a module: calls are counted and passed on, weights are not accessible."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"], self.calls = inner, 0

    def forward(self, *args: Any, **more: Any) -> Any:
        self.calls += 1
        return self.__dict__["inner"](*args, **more)


def check_single_formats(checker: Checker, stride: int) -> None:
    """Check single formats on all units that the network calls, and one format on all units.

    Args:
        checker: the checker of the network.
        stride: 1 checks all formats; 2 checks one half on even seeds and the other on odd seeds.
    """
    rng = random.Random(f"formats {checker.case.seed}")
    retrieval = checker.case.signature.single_output.kind == "retrieval"
    called = set(find_called_units(checker))
    for draws, role in ((TABLES, "table"), (LAYERS, "dense")):
        units = [u.name for u in Unit.of(checker.source.module) if u.role == role]
        names = tuple(name for name in units if name in called)
        kinds = _kinds(draws, retrieval)
        checker.apply_step(draws[rng.choice(kinds)](rng, ("*",)), checker.source)
        for index, kind in enumerate(kinds if names else ()):
            if (index + checker.case.seed) % stride:
                continue
            if kind in SLOW and checker.case.seed % 4:
                continue
            model = checker.apply_step(draws[kind](rng, names), checker.source)
            if model is not None and kind not in TRAINS:
                checker.check_module(model, checker.source, f"{kind} alone")


def check_value_steps(checker: Checker, count: int) -> None:
    """Check ``count`` value-changing steps, each alone on the original network."""
    rng = random.Random(f"values {checker.case.seed}")
    retrieval = checker.case.signature.single_output.kind == "retrieval"
    kinds = sorted(VALUES)
    first = checker.case.seed * count
    for index in range(count):
        kind = kinds[(first + index) % len(kinds)]
        if not (retrieval and kind in SUPERVISED):
            checker.apply_step(VALUES[kind](rng), checker.source)


def check_network(checker: Checker) -> None:
    """Run the checks of the nightly tier on one network."""
    seed = checker.case.seed
    if seed % PLAIN_EVERY == 0:
        checker.check_lowering(checker.source, TARGETS[seed // PLAIN_EVERY % 3], "plain")
    check_mixed_formats(checker, 0, "onnxruntime")
    check_mixed_formats(checker, 1, TARGETS[1 + seed % 2])  # a TensorRT target
    check_single_formats(checker, stride=2)
    check_value_steps(checker, VALUE_STEPS)


PASSES: dict[str, Callable[[Checker], Any]] = {
    "whole": check_network,
    "formats": lambda checker: check_single_formats(checker, stride=1),
    "values": lambda checker: check_value_steps(checker, len(VALUES)),
    "onnxruntime": lambda checker: check_mixed_formats(checker, 0, "onnxruntime"),
    "tensorrt": lambda checker: check_mixed_formats(checker, 1, TARGETS[1 + checker.case.seed % 2]),
}
