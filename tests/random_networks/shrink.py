"""Reduce a failing network while it still fails: fewer parts and inputs, simpler settings.

A side is the config of one tower, or of the whole network if it has none: ``parts`` (specs) and
``head``, as ``network.py`` describes them.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from compressors.contracts import Signature, tensor_names
from tests.random_networks.generator import Case, with_config

# The simplest value of each setting of a part.
SIMPLER: dict[str, Any] = {
    "activation": "none",
    "norm": "none",
    "dropout": 0.0,
    "bias": True,
    "weighted": False,
    "padding": False,
    "functional": False,
    "rows": 20,
    "dim": 4,
    "width": 2,
    "heads": 1,
    "layers": 1,
    "experts": 2,
    "rank": 0,
}


def shrink_case(case: Case, fails: Callable[[Case], bool], seconds: float = 600) -> Case:
    """Search in ``seconds`` for the smallest network for which ``fails`` is true; return it."""
    deadline, is_smaller = time.monotonic() + seconds, True
    while is_smaller and time.monotonic() < deadline:
        is_smaller = False
        for candidate in candidates(case):
            if time.monotonic() > deadline:
                break
            if _can_be_built(candidate) and fails(candidate):
                case, is_smaller = candidate, True
                break
    return case


def _can_be_built(candidate: Case) -> bool:
    """Return whether the network can be built and its weights can be set."""
    try:
        candidate.model()
    except Exception:  # any error of a part whose inputs no longer fit
        return False
    return True


def candidates(case: Case) -> Iterator[Case]:
    """Yield reduced networks; those without a whole part come first."""
    for side_name, side in _sides(case.config):
        for number in reversed(range(len(side["parts"]))):
            yield from _changed(case, side_name, _without_part(side, number))
    for side_name, side in _sides(case.config):
        yield from _simpler_heads(case, side_name, side)
        for number, spec in enumerate(side["parts"]):
            for key, value in SIMPLER.items():
                if key in spec["settings"] and spec["settings"][key] != value:
                    changed = copy.deepcopy(side)
                    changed["parts"][number]["settings"][key] = value
                    yield from _changed(case, side_name, changed)
            widths = spec["settings"].get("widths", [])
            if len(widths) > 1:
                changed = copy.deepcopy(side)
                changed["parts"][number]["settings"]["widths"] = widths[:1]
                yield from _changed(case, side_name, changed)
            if "ties" in spec and spec["kind"] != "TiedOutput":
                changed = copy.deepcopy(side)
                del changed["parts"][number]["ties"]
                yield from _changed(case, side_name, changed)


def _simpler_heads(case: Case, side_name: str, side: dict[str, Any]) -> Iterator[Case]:
    head = side["head"]
    for name in head["reads"] if len(head["reads"]) > 1 else ():
        changed = copy.deepcopy(side)
        changed["head"]["reads"].remove(name)
        yield from _changed(case, side_name, changed)
    simple = {"wide": [], "widths": [], "norm": False, "squeeze": "one", "normalize": "none"}
    for key, value in simple.items():
        if key in head and head[key] != value:
            changed = copy.deepcopy(side)
            changed["head"][key] = value
            yield from _changed(case, side_name, changed)


def _sides(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and config of both towers, or of the whole network with an empty name."""
    if "parts" in config:
        return [("", config)]
    return [(side, config[side]) for side in ("query", "item")]


def _without_part(side: dict[str, Any], number: int) -> dict[str, Any] | None:
    """Remove a part; its consumers read the first part that it read, or else the first part.

    Returns:
        The remaining parts and the head; None if the part cannot be removed.
    """
    parts = copy.deepcopy(side["parts"])
    removed = parts.pop(number)
    name = removed["name"]
    if any(name in (spec.get("shares"), spec.get("ties")) for spec in parts):
        return None
    earlier = [spec["name"] for spec in parts[:number]]
    replacement = (removed.get("takes") or earlier or [None])[0]
    for spec in parts:
        if name in spec.get("takes", ()):
            if replacement is None:
                return None
            spec["takes"] = [replacement if source == name else source for source in spec["takes"]]
    head = copy.deepcopy(side["head"])
    reads = [replacement if source == name else source for source in head["reads"]]
    head["reads"] = list(dict.fromkeys(source for source in reads if source is not None))
    if "wide" in head:
        head["wide"] = [source for source in head["wide"] if source != name]
    return {"parts": parts, "head": head} if head["reads"] else None


def _changed(case: Case, side_name: str, side: dict[str, Any] | None) -> Iterator[Case]:
    """Yield the case with another config of one side and without unused inputs, if it is valid."""
    if side is None:
        return
    config = side if not side_name else {**case.config, side_name: side}
    used = {
        name
        for _, each_side in _sides(config)
        for spec in each_side["parts"]
        for name in spec.get("inputs", ())
    }
    remaining = tuple(item for item in case.signature.inputs if used & set(tensor_names(item)))
    if not remaining:
        return
    document = case.signature.model_dump()
    document["inputs"] = [item.model_dump() for item in remaining]
    names = {item.name for item in remaining}
    for tower in (document["towers"] or {}).values():
        tower["inputs"] = [name for name in tower["inputs"] if name in names]
    try:
        signature = Signature.model_validate(document)
    except ValueError:  # a tower without inputs, or without its item
        return
    yield with_config(case, config, signature)
