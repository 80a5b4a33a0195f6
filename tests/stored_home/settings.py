"""List all settings that a current order file may contain, as JSON: steps, limits and orders.

The steps are every registered step with all fields, once with defaults and once for each other
value of a field with named choices. The limits are on every metric, compared with every reference
(baseline, champion or none). The orders are one complete order for each preset.
"""

import types
import typing
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from compressors.contracts import Limit
from compressors.contracts.limits import Against
from compressors.contracts.metrics import default_metrics
from compressors.core.registries import METHODS, AnyStep
from flows.order import Order
from flows.terms import Preset

Document = dict[str, Any]
STEP: TypeAdapter[Any] = TypeAdapter(AnyStep)


def registered_steps() -> tuple[type[BaseModel], ...]:
    """Return the classes of all registered steps."""
    classes: tuple[type[BaseModel], ...] = tuple(METHODS.values())
    return classes


def step_documents() -> list[Document]:
    """Return all registered steps as JSON with all fields."""
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
                except ValidationError:  # a choice that also requires another setting
                    continue
    return documents


def limit_documents() -> list[Document]:
    """Return limits on every metric with every reference that the metric allows."""
    documents: list[Document] = []
    for metric in default_metrics():
        for against in get_args(Against):
            for bound in ("at_least", "at_most"):
                try:
                    limit = Limit(metric=metric, against=against, **{bound: 0.5})
                except ValidationError:  # a score change allows only ``absolute``
                    continue
                documents.append(limit.model_dump(mode="json"))
    return documents


def order_documents() -> list[Document]:
    """Return one order per preset with all fields, as in a report."""
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
    """Return the values of a field's ``Literal`` type, including those within a union."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(choice for part in get_args(annotation) for choice in _choices(part))
    return ()
