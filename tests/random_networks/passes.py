"""What is done with one random network: mixed formats on every target, and formats alone."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from compressors.contracts import TargetKind
from compressors.core.model import Model
from compressors.core.units import Unit, swap
from tests.random_networks.check import Checker, units_of
from tests.random_networks.inputs import allowed
from tests.random_networks.steps import COMPOSING, LAST, LAYERS, TABLES, TARGETS, TRAINS, VALUES

PLAIN_EVERY = 10
VALUES_ALONE = 1
SUPERVISED = ("drop_layers", "l1_training", "fine_tune", "distill")
SLOW = ("additive_codes", "neural_codes", "qat")


def mixed(checker: Checker, number: int, target: TargetKind | None) -> Model:
    """Some value-changing steps, then every unit in another format; lowered for one target.

    Args:
        checker: of the network.
        number: of the pass; another one deals the formats out in another order.
        target: what to lower for; None to check the module alone.
    """
    rng = random.Random(f"pass {checker.case.seed} {number}")
    model = checker.source
    retrieval = checker.case.signature.task == "retrieval"
    values = rng.sample(sorted(VALUES), rng.choice((0, 1, 1, 1, 2)))
    for name in values:
        if not (retrieval and name in SUPERVISED):
            model = checker.applied(VALUES[name](rng), model) or model
    plain = model
    called = set(called_units(checker))
    tables, layers = (
        [n for n in names if n in called or rng.random() < 0.1] for names in units_of(plain)
    )
    for kind, names in dealt(rng, tables, _kinds(TABLES, retrieval), checker.case.seed + number):
        model = checker.applied(TABLES[kind](rng, names), model) or model
        if kind in COMPOSING and rng.random() < 0.7:
            inner = [u.name for u in Unit.of(model.module) if u.part_of in names]
            packing = rng.choice(("rowwise_int8", "rowwise_int4", "float16", "kmeans", "bfloat16"))
            if inner:
                model = checker.applied(TABLES[packing](rng, tuple(inner)), model) or model
    kinds = [kind for kind in _kinds(LAYERS, retrieval) if kind not in TRAINS]
    for kind, names in dealt(rng, layers, kinds, checker.case.seed + number):
        model = checker.applied(LAYERS[kind](rng, names), model) or model
    where = f"pass {number} ({', '.join(values)})"
    checker.guarded(where, lambda: checker.module_checked(model, plain, where))
    if rng.random() < 0.2 and not retrieval:
        model = checker.applied(LAST[rng.choice(sorted(LAST))](rng), model) or model
    if target is not None:
        checker.lowered(model, target, where)
    return model


def _kinds(draws: dict[str, Any], retrieval: bool) -> list[str]:
    """Formats that a task has; those that train need labels."""
    without = {"qat", "additive_codes", "drop_tables"} if retrieval else set()
    return sorted(draws.keys() - without)


def dealt(
    rng: random.Random, units: Sequence[str], kinds: Sequence[str], first: int
) -> list[tuple[str, tuple[str, ...]]]:
    """Formats with the units that get them; over seeds every format has its turn."""
    shuffled = rng.sample(list(units), len(units))
    hands: dict[str, list[str]] = {}
    for place, unit in enumerate(shuffled):
        if rng.random() < 0.12:
            continue  # stays float
        hands.setdefault(kinds[(first * 3 + place) % len(kinds)], []).append(unit)
    return [(kind, tuple(names)) for kind, names in hands.items()]


@torch.no_grad()
def called_units(checker: Checker) -> tuple[str, ...]:
    """Units that the network calls, and whose weights no other code of it reads."""
    rows = allowed(checker.case.signature, checker.tables, checker.rows["typical"])[0]
    found = []
    for unit in Unit.of(checker.source.module):
        model = checker.source.private().module
        seen = _Sealed(unit.module)
        swap(model, unit.name, seen)
        try:
            model(**rows)
        except (AttributeError, TypeError, RuntimeError):
            continue
        if seen.calls and unit.shared_with is None:
            found.append(unit.name)
    return tuple(found)


class _Sealed(nn.Module):
    """A module that can be called, and shows no weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"], self.calls = inner, 0

    def forward(self, *args: Any, **more: Any) -> Any:
        self.calls += 1
        return self.__dict__["inner"](*args, **more)


def formats_alone(checker: Checker, every: int) -> None:
    """Formats alone on all units they can take, and one on every unit there is.

    Args:
        checker: of the network.
        every: 1 for all formats, 2 for one half on even seeds and the other half on odd ones.
    """
    rng = random.Random(f"formats {checker.case.seed}")
    retrieval = checker.case.signature.task == "retrieval"
    called = set(called_units(checker))
    for draws, role in ((TABLES, "table"), (LAYERS, "dense")):
        units = [u.name for u in Unit.of(checker.source.module) if u.role == role]
        names = tuple(name for name in units if name in called)
        kinds = _kinds(draws, retrieval)
        checker.applied(draws[rng.choice(kinds)](rng, ("*",)), checker.source)
        for place, kind in enumerate(kinds if names else ()):
            if (place + checker.case.seed) % every:
                continue
            if kind in SLOW and checker.case.seed % 4:
                continue  # these are in the mixed passes too
            model = checker.applied(draws[kind](rng, names), checker.source)
            if model is not None and kind not in TRAINS:
                checker.module_checked(model, checker.source, f"{kind} alone")


def value_steps(checker: Checker, count: int) -> None:
    """Some value-changing steps alone: the same function, or the same stored state."""
    rng = random.Random(f"values {checker.case.seed}")
    retrieval = checker.case.signature.task == "retrieval"
    kinds = sorted(VALUES)
    first = checker.case.seed * count
    for place in range(count):
        kind = kinds[(first + place) % len(kinds)]
        if not (retrieval and kind in SUPERVISED):
            checker.applied(VALUES[kind](rng), checker.source)


def whole(checker: Checker) -> None:
    """Everything that the nightly run does with one network."""
    seed = checker.case.seed
    if seed % PLAIN_EVERY == 0:
        checker.lowered(checker.source, TARGETS[seed // PLAIN_EVERY % 3], "plain")
    mixed(checker, 0, "onnxruntime")
    mixed(checker, 1, TARGETS[1 + seed % 2])
    formats_alone(checker, 2)
    value_steps(checker, VALUES_ALONE)


PASSES: dict[str, Callable[[Checker], Any]] = {
    "whole": whole,
    "formats": lambda checker: formats_alone(checker, 1),
    "values": lambda checker: value_steps(checker, len(VALUES)),
    "onnxruntime": lambda checker: mixed(checker, 0, "onnxruntime"),
    "tensorrt": lambda checker: mixed(checker, 1, TARGETS[1 + checker.case.seed % 2]),
}
