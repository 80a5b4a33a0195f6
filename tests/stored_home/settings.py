"""Every setting that a present order file may hold, written out: steps, limits, whole orders.

Each registered step with all of its fields, once with its defaults and once with every other choice
of a field that has named choices; each metric with each reference; each preset as a full order.
"""

import types
import typing
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from compressors.contracts import Limit
from compressors.contracts.limits import Against
from compressors.contracts.metric_properties import Measure
from compressors.core.registries import AnyStep
from flows.order import Order
from flows.terms import Preset

Document = dict[str, Any]
STEP: TypeAdapter[Any] = TypeAdapter(AnyStep)


def registered_steps() -> tuple[type[BaseModel], ...]:
    """The class of every registered step."""
    classes: tuple[type[BaseModel], ...] = get_args(get_args(AnyStep)[0])
    return classes


def step_documents() -> list[Document]:
    """Every registered step as JSON with all fields."""
    documents: list[Document] = []
    for step in registered_steps():
        default = step().model_dump(mode="json")
        documents.append(default)
        for name, field in step.model_fields.items():
            for choice in _choices(field.annotation):
                if name == "kind" or choice == default[name]:
                    continue
                try:
                    documents.append(step(**{name: choice}).model_dump(mode="json"))
                except ValidationError:  # a choice that needs another setting as well
                    continue
    return documents


def limit_documents() -> list[Document]:
    """A limit on every metric with every reference that it has."""
    documents: list[Document] = []
    for metric in get_args(Measure):
        for against in get_args(Against):
            for bound in ("at_least", "at_most"):
                try:
                    limit = Limit(metric=metric, against=against, **{bound: 0.5})
                except ValidationError:  # a change of scores has no reference
                    continue
                documents.append(limit.model_dump(mode="json"))
    return documents


def order_documents() -> list[Document]:
    """An order of every preset with all fields, as a report holds it."""
    orders: list[Document] = []
    for preset in get_args(Preset):
        order = Order(
            model="clicks@1",
            preset=preset,
            limits=(Limit(metric="auc", against="baseline", at_least=-0.002),),
            steps=tuple(step() for step in registered_steps()) if preset == "custom" else (),
        )
        orders.append(order.model_dump(mode="json"))
    return orders


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The named choices of a field, also inside of a union."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(choice for part in get_args(annotation) for choice in _choices(part))
    return ()
