"""The terms of an order, without the types of steps: importing this loads no tensor library.

The command line checks with these terms whether an order was completed before. ``Order`` in
``order.py`` adds custom recipes.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from compressors.contracts import TARGETS, Frozen, Limit, Target, default_target, limit_problems
from compressors.contracts.value_errors import value_error
from infra.data.checks import Rules
from tasks.orchestration.documents import BatchSizes

Wanted = Literal["required", "optional", "off"]
Preset = Literal["small", "fast", "safe", "smallest", "custom"]
DEFAULT_BUDGET = 0.001
"""What presets ``small`` and ``smallest`` may lose of the metric where the order does not say."""


def _add_target_fields(schema: dict[str, Any]) -> None:
    """Add a field for each target to the JSON schema of ``Targets``, before the others."""
    fields = {
        item.field: {
            "default": "required" if item.is_default else "off",
            **({"description": item.description} if item.description else {}),
            "enum": list(get_args(Wanted)),
            "title": item.title or item.label,
            "type": "string",
        }
        for item in TARGETS.values()
    }
    every = {**fields, **schema["properties"]}
    schema["properties"] = {
        name: {**field, "position": place} for place, (name, field) in enumerate(every.items())
    }
    schema["additionalProperties"] = False


class Targets(Frozen):
    """Where the result will be served. An optional target that cannot be built is left out."""

    # Each target has a field, 'required', 'optional' or 'off': that of its declaration. They are
    # extra fields of this model, so that a target that is registered later can be ordered.
    model_config = ConfigDict(extra="allow", json_schema_extra=_add_target_fields)
    __pydantic_extra__: dict[str, Wanted]

    smallest_batch: int = Field(1, ge=1)
    best_batch: int = Field(64, ge=1, description="Engines are tuned for it.")
    largest_batch: int = Field(1024, ge=1)
    build_seconds: float = Field(600, gt=0, description="Time limit of one engine build.")

    @model_validator(mode="before")
    @classmethod
    def _fields_of_targets(cls, data: Any) -> Any:
        """Add targets that the order does not name, and drop those that need not be stored."""
        if not isinstance(data, Mapping):
            return data
        by_field = {item.field: item for item in TARGETS.values()}
        unknown = [name for name in data if name not in by_field and name not in cls.model_fields]
        if unknown:
            faults = [
                InitErrorDetails(
                    type=value_error("target_unknown", target=name, known=tuple(by_field)),
                    loc=(name,),
                    input=data[name],
                )
                for name in unknown
            ]
            raise ValidationError.from_exception_data(cls.__name__, faults)
        ordered = {
            name: data.get(name, "required" if item.is_default else "off")
            for name, item in by_field.items()
            if item.is_default or item.is_always_stored or data.get(name, "off") != "off"
        }
        return {**ordered, **{name: data[name] for name in data if name not in by_field}}

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.smallest_batch <= self.best_batch <= self.largest_batch:
            raise value_error("batch_sizes_shrink")
        if not self.wanted():
            raise value_error("targets_off")
        return self

    @model_serializer(mode="wrap")
    def _targets_first(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        targets = {name: fields.pop(name) for name in self.__pydantic_extra__ if name in fields}
        return targets | fields

    def wanted(self) -> dict[str, Wanted]:
        """Return the targets that are not off."""
        ordered = {item.name: self._wanted(item) for item in TARGETS.values()}
        return {target: wanted for target, wanted in ordered.items() if wanted != "off"}

    def _wanted(self, declared: Target) -> Wanted:
        return self.__pydantic_extra__.get(declared.field, "off")

    def compared(self) -> tuple[str, ...]:
        """Return the targets for which the untouched model and the champion are compared.

        They are the measured targets. Without one it is the default target, for the bytes before.
        """
        measured = tuple(name for name in self.wanted() if TARGETS[name].is_measured)
        return measured or (default_target().name,)

    def batch(self) -> BatchSizes:
        """Return the expected batch sizes."""
        return BatchSizes(low=self.smallest_batch, best=self.best_batch, high=self.largest_batch)


class Terms(Frozen):
    """Compress one model, judge what will be served, and register the result."""

    model: str = Field(
        min_length=1,
        title="Model",
        description="A packed bundle: name@version, name (its newest), or an artifact URI.",
        json_schema_extra={"position": 0},
    )
    preset: Preset = Field(
        "safe",
        title="Preset",
        description="safe: int8 tables, float16 layers. fast: int8 tables and layers. small: rows "
        "that training hardly looks up share one, a quarter of the dense channels, distilled; int4 "
        "tables, int8 layers. smallest: small, and more channels go. custom: the steps below. The "
        "cuts of small and smallest lose at most the quality budget. Each preset gives no more "
        "bytes than the one before it.",
        json_schema_extra={"position": 1},
    )
    limits: tuple[Limit, ...] = Field(
        min_length=1,
        title="Limits",
        description="What the result must keep; at least one. A usual first one: auc, against "
        "baseline, at_least -0.002.",
        json_schema_extra={"position": 2},
    )
    targets: Targets = Field(
        default_factory=Targets, title="Targets", json_schema_extra={"position": 3}
    )
    rules: Rules = Field(
        default_factory=Rules, title="Data rules", json_schema_extra={"position": 5}
    )
    promote: bool = Field(
        False,
        title="Promote if accepted",
        description="Make the result champion at once if every limit holds.",
        json_schema_extra={"position": 6},
    )
    seed: int = Field(0, ge=0, json_schema_extra={"position": 7})
    attempt: int = Field(
        0,
        ge=0,
        title="Attempt",
        description="Raise it to run the same order again, as a new version.",
        json_schema_extra={"position": 8},
    )

    budget: float | None = Field(
        None,
        ge=0,
        title="Quality budget",
        description="How much of the signature's metric the recipe may lose on validation rows, "
        "such as 0.001. Steps that would lose more are left out, with the training that follows "
        "them. Without a value: 0.001 for the cuts of presets small and smallest, none for others.",
        json_schema_extra={"position": 9},
    )

    teachers: tuple[str, ...] = Field(
        (),
        title="Other teachers",
        description="Models whose predictions are averaged with the original's where a step learns "
        "from them: packed bundles, or registry:name@version. Same inputs and output.",
        json_schema_extra={"position": 10},
    )

    @field_validator("limits")
    @classmethod
    def _limits_mean_something(cls, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        if problems := limit_problems(limits):
            raise value_error("limits_not_meant", reasons=problems)
        return limits

    def quality_budget(self) -> float | None:
        """The metric that the recipe may lose on validation rows: as ordered, or by default."""
        if self.budget is None and self.preset in ("small", "smallest"):
            return DEFAULT_BUDGET
        return self.budget

    def against_champion(self) -> bool:
        """Whether any limit compares with the champion."""
        return any(limit.against == "champion" for limit in self.limits)

    def own_steps(self) -> list[dict[str, Any]]:
        """The steps of preset ``custom`` as plain values; none for the other presets."""
        return []
