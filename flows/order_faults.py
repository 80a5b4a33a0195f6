"""Format the faults of an order: pydantic's errors as sentences, with the valid names."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from infra.printable import bounded

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Place = tuple[int | str, ...]

MOST_SENTENCES = 20


def sentences(fault: "ValidationError", model: "type[BaseModel] | None" = None) -> list[str]:
    """Format one sentence per fault: its location, the value, the valid values.

    Returns the first ``MOST_SENTENCES``, each of bounded length, and the number of further faults.

    Args:
        fault: pydantic's error.
        model: the validated class, for the names of its fields.
    """
    errors = fault.errors()
    places = [error["loc"] for error in errors]
    errors = [
        error
        for error in errors
        # A list with only faulty items counts as empty; that is not a second fault.
        if not (error["type"] == "too_short" and any(_inside(p, error["loc"]) for p in places))
    ]
    found = [
        bounded(f"{'.'.join(map(str, error['loc'])) or fault.title}: {_sentence(error, model)}")
        for error in errors[:MOST_SENTENCES]
    ]
    more = len(errors) - len(found)
    return found if not more else [*found, f"and {more} more faults"]


def _inside(place: Place, outer: Place) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _sentence(error: Any, model: "type[BaseModel] | None") -> str:
    place, context = error["loc"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"there is no such setting{_instead(str(place[-1]), _names(model, place[:-1]))}"
        case "union_tag_invalid":
            there = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
            kind = str(context["discriminator"]).strip("'")
            return f"there is no {kind} {context['tag']!r}{_instead(str(context['tag']), there)}"
        case "too_short":
            found = context["actual_length"]
            return f"needs at least {context['min_length']}; found {found or 'none'}"
        case "target_unknown":
            return f"there is no target {context['target']!r}" + _instead(
                context["target"], context["known"]
            )
        case "missing":
            return "is missing"
        case "value_error":
            return str(context.get("error", error["msg"]))
        case _:
            return str(error["msg"])


def _instead(found: str, there: Sequence[str]) -> str:
    if not there:
        return ""
    near = get_close_matches(found, there, n=1)
    guess = f", did you mean {near[0]!r}?" if near else ";"
    return f"{guess} There are {', '.join(sorted(there))}."


def _names(model: "type[BaseModel] | None", place: Place) -> tuple[str, ...]:
    """Return the field names at a location in a model; none if the location is unknown."""
    kinds: list[Any] = [] if model is None else [model]
    for part in place:
        kinds = [inner for kind in kinds for inner in _at(kind, part)]
    return tuple(name for kind in kinds for name in kind.model_fields)


def _at(kind: "type[BaseModel]", part: int | str) -> "Iterator[type[BaseModel]]":
    """Return the models that a field may contain, or that a tag or list index selects."""
    if isinstance(part, int) or part not in kind.model_fields:
        tag = kind.model_fields.get("kind")
        if isinstance(part, int) or (tag is not None and tag.default == part):
            yield kind
        return
    yield from _models(kind.model_fields[part].annotation)


def _models(annotation: Any) -> "Iterator[type[BaseModel]]":
    """Return the models in an annotation, at any depth."""
    from pydantic import BaseModel

    from compressors.core.registries import METHODS
    from compressors.core.steps.step import StepSettings

    if annotation is StepSettings:
        yield from METHODS.values()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
