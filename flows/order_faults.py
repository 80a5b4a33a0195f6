"""Format pydantic's validation errors of an order as sentences that list the valid names."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from infra.printable import truncate_sentence

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]
"""Field names, list indices and step kinds (pydantic's tags), from the order to one value."""

MAX_SENTENCES = 20
"""Errors of one order that are reported; the others are only counted."""


def format_errors(fault: "ValidationError", model: "type[BaseModel] | None" = None) -> list[str]:
    """Format each error as a sentence with its location in the order.

    Args:
        fault: the exception that pydantic raised.
        model: the validated class, to suggest names of its fields.

    Returns:
        At most ``MAX_SENTENCES`` sentences of bounded length, then the number of further errors.
    """
    errors = fault.errors()
    locations = [error["loc"] for error in errors]
    errors = [
        error
        for error in errors
        # pydantic also reports a list as too short if all of its items are invalid.
        if error["type"] != "too_short"
        or not any(_is_inside(location, error["loc"]) for location in locations)
    ]
    lines = [
        truncate_sentence(
            f"{'.'.join(map(str, error['loc'])) or fault.title}: {_describe(error, model)}"
        )
        for error in errors[:MAX_SENTENCES]
    ]
    omitted = len(errors) - len(lines)
    return lines if not omitted else [*lines, f"and {omitted} more errors"]


def _is_inside(location: Location, outer: Location) -> bool:
    """Return whether a location is part of the value at another location."""
    return len(location) > len(outer) and location[: len(outer)] == outer


def _describe(error: Any, model: "type[BaseModel] | None") -> str:
    """Return the sentence of one pydantic error, without its location."""
    location, context = error["loc"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            name, valid_names = str(location[-1]), _list_field_names(model, location[:-1])
            return f"there is no such setting{_suggest_name(name, valid_names)}"
        case "union_tag_invalid":
            kinds = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
            field = str(context["discriminator"]).strip("'")
            kind = context["tag"]
            return f"there is no {field} {kind!r}{_suggest_name(str(kind), kinds)}"
        case "too_short":
            length = context["actual_length"]
            return f"expected at least {context['min_length']}, got {length or 'none'}"
        case "target_unknown":
            similar = _find_most_similar(context["target"], context["known"])
            return f"{error['msg']}{f' (did you mean {similar!r}?)' if similar else ''}"
        case "missing":
            return "is missing"
        case "value_error":
            return str(context.get("error", error["msg"]))
        case _:
            return str(error["msg"])


def _suggest_name(name: str, valid_names: Sequence[str]) -> str:
    """Return the end of a sentence about an unknown name, and a sentence with all valid names.

    The end suggests the most similar valid name; it is a period if none is similar.
    """
    if not valid_names:
        return ""
    similar = _find_most_similar(name, valid_names)
    end = f", did you mean {similar!r}?" if similar else "."
    return f"{end} Valid names: {', '.join(sorted(valid_names))}."


def _find_most_similar(name: str, valid_names: Sequence[str]) -> str | None:
    """Return the valid name that is most similar to a misspelled one; None if none is similar."""
    return next(iter(get_close_matches(name, valid_names, n=1)), None)


def _list_field_names(model: "type[BaseModel] | None", location: Location) -> tuple[str, ...]:
    """Return the field names at a location in a model class; none if it is unknown."""
    classes: list[Any] = [] if model is None else [model]
    for part in location:
        classes = [inner for outer in classes for inner in _find_classes_at(outer, part)]
    return tuple(name for item in classes for name in item.model_fields)


def _find_classes_at(model: "type[BaseModel]", part: int | str) -> "Iterator[type[BaseModel]]":
    """Yield the model classes at one part of a location: a field, a list index or a step kind."""
    if isinstance(part, int) or part not in model.model_fields:
        tag = model.model_fields.get("kind")
        if isinstance(part, int) or (tag is not None and tag.default == part):
            yield model
        return
    yield from _find_model_classes(model.model_fields[part].annotation)


def _find_model_classes(annotation: Any) -> "Iterator[type[BaseModel]]":
    """Yield the model classes in a type annotation, at any depth."""
    from pydantic import BaseModel

    from compressors.core.registries import METHODS
    from compressors.core.steps.step import StepSettings

    if annotation is StepSettings:
        yield from METHODS.values()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _find_model_classes(inner)
