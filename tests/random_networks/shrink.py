"""Make a failing network smaller while it still fails: fewer parts, inputs and settings."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from compressors.contracts import Signature, tensor_names
from tests.random_networks.generator import Case, with_config

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


def shrunk(case: Case, fails: Callable[[Case], bool], seconds: float = 600) -> Case:
    """The smallest network found within some time for which ``fails`` is still true."""
    end, smaller = time.monotonic() + seconds, True
    while smaller and time.monotonic() < end:
        smaller = False
        for candidate in candidates(case):
            if time.monotonic() > end:
                break
            if _is_one(candidate) and fails(candidate):
                case, smaller = candidate, True
                break
    return case


def _is_one(candidate: Case) -> bool:
    """Whether a network can be built and its weights set."""
    try:
        candidate.model()
    except Exception:  # whatever a part raises that does not fit what it now reads
        return False
    return True


def candidates(case: Case) -> Iterator[Case]:
    """Smaller networks than one, the smallest first."""
    for path, side in _sides(case.config):
        for number in reversed(range(len(side["parts"]))):
            yield from _changed(case, path, _without(side, number))
    for path, side in _sides(case.config):
        yield from _simpler_heads(case, path, side)
        for number, spec in enumerate(side["parts"]):
            for key, value in SIMPLER.items():
                if key in spec["settings"] and spec["settings"][key] != value:
                    changed = copy.deepcopy(side)
                    changed["parts"][number]["settings"][key] = value
                    yield from _changed(case, path, changed)
            widths = spec["settings"].get("widths", [])
            if len(widths) > 1:
                changed = copy.deepcopy(side)
                changed["parts"][number]["settings"]["widths"] = widths[:1]
                yield from _changed(case, path, changed)
            for relation in ("shares", "ties"):
                if relation in spec and spec["kind"] != "TiedOutput" and relation != "shares":
                    changed = copy.deepcopy(side)
                    del changed["parts"][number][relation]
                    yield from _changed(case, path, changed)


def _simpler_heads(case: Case, path: str, side: dict[str, Any]) -> Iterator[Case]:
    head = side["head"]
    for name in head["reads"] if len(head["reads"]) > 1 else ():
        changed = copy.deepcopy(side)
        changed["head"]["reads"].remove(name)
        yield from _changed(case, path, changed)
    simple = {"wide": [], "widths": [], "norm": False, "squeeze": "one", "unit": "none"}
    for key, value in simple.items():
        if key in head and head[key] != value:
            changed = copy.deepcopy(side)
            changed["head"][key] = value
            yield from _changed(case, path, changed)


def _sides(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if "parts" in config:
        return [("", config)]
    return [(side, config[side]) for side in ("query", "item")]


def _without(side: dict[str, Any], number: int) -> dict[str, Any] | None:
    """The parts without one; what read it reads what it read, or another part."""
    parts = copy.deepcopy(side["parts"])
    gone = parts.pop(number)
    name = gone["name"]
    if any(name in (spec.get("shares"), spec.get("ties")) for spec in parts):
        return None
    before = [spec["name"] for spec in parts[:number]]
    instead = (gone.get("takes") or before or [None])[0]
    for spec in parts:
        if name in spec.get("takes", ()):
            if instead is None:
                return None
            spec["takes"] = [instead if taken == name else taken for taken in spec["takes"]]
    head = copy.deepcopy(side["head"])
    reads = [instead if taken == name else taken for taken in head["reads"]]
    head["reads"] = list(dict.fromkeys(taken for taken in reads if taken is not None))
    if "wide" in head:
        head["wide"] = [taken for taken in head["wide"] if taken != name]
    return {"parts": parts, "head": head} if head["reads"] else None


def _changed(case: Case, path: str, side: dict[str, Any] | None) -> Iterator[Case]:
    if side is None:
        return
    config = side if not path else {**case.config, path: side}
    read = {
        name
        for _, part in _sides(config)
        for spec in part["parts"]
        for name in spec.get("inputs", ())
    }
    kept = tuple(item for item in case.signature.inputs if read & set(tensor_names(item)))
    if not kept:
        return
    document = case.signature.model_dump()
    document["inputs"] = [item.model_dump() for item in kept]
    names = {item.name for item in kept}
    for tower in (document["towers"] or {}).values():
        tower["inputs"] = [name for name in tower["inputs"] if name in names]
    try:
        signature = Signature.model_validate(document)
    except ValueError:  # a tower without inputs, or without its item
        return
    yield with_config(case, config, signature)
