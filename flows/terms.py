"""``Terms``: every field of an order except custom steps, whose classes need a tensor library.

Importing this module is fast. The command line uses it to find out whether an order was completed
before, without loading torch. ``Order`` in ``order.py`` adds the custom steps.
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
from tasks.orchestration.graph_documents import BatchSizes

Requirement = Literal["required", "optional", "off"]
Preset = Literal["small", "fast", "safe", "smallest", "custom"]
DEFAULT_BUDGET = 0.001
"""Quality budget of presets ``small`` and ``smallest`` if the order sets none."""


def _add_target_fields(schema: dict[str, Any]) -> None:
    """Add a field for each target to the JSON schema of ``Targets``, before the other fields."""
    target_fields = {
        item.field: {
            "default": "required" if item.is_default else "off",
            **({"description": item.description} if item.description else {}),
            "enum": list(get_args(Requirement)),
            "title": item.title or item.label,
            "type": "string",
        }
        for item in TARGETS.values()
    }
    all_fields = {**target_fields, **schema["properties"]}
    schema["properties"] = {
        name: {**field, "position": index} for index, (name, field) in enumerate(all_fields.items())
    }
    schema["additionalProperties"] = False


class Targets(Frozen):
    """Where the result will be served. An optional target that cannot be built is left out."""

    # Each registered target has a field with the value 'required', 'optional' or 'off'. These are
    # extra fields of this class, so that targets registered after its definition have one, too.
    model_config = ConfigDict(extra="allow", json_schema_extra=_add_target_fields)
    __pydantic_extra__: dict[str, Requirement]

    # Numbers of rows per request.
    smallest_batch: int = Field(1, ge=1)
    best_batch: int = Field(64, ge=1, description="Engines are tuned for this size.")
    largest_batch: int = Field(1024, ge=1)
    build_seconds: float = Field(600, gt=0, description="Time limit of one engine build.")

    @model_validator(mode="before")
    @classmethod
    def _complete_target_fields(cls, data: Any) -> Any:
        """Complete the field of each registered target.

        - The default target: if the order omits it, it is required.
        - Targets with ``is_always_stored`` (those of the first version of recpress): if the order
          omits them, they are stored as 'off'.
        - All other targets: a field with 'off' is removed, so that orders of recpress versions
          without this target have the same digest.

        Raises:
            ValidationError: a field belongs to no registered target.
        """
        if not isinstance(data, Mapping):
            return data
        by_field = {item.field: item for item in TARGETS.values()}
        unknown = [name for name in data if name not in by_field and name not in cls.model_fields]
        if unknown:
            errors = [
                InitErrorDetails(
                    type=value_error("target_unknown", target=name, known=tuple(by_field)),
                    loc=(name,),
                    input=data[name],
                )
                for name in unknown
            ]
            raise ValidationError.from_exception_data(cls.__name__, errors)
        target_values = {
            name: data.get(name, "required" if item.is_default else "off")
            for name, item in by_field.items()
            if item.is_default or item.is_always_stored or data.get(name, "off") != "off"
        }
        return {**target_values, **{name: data[name] for name in data if name not in by_field}}

    @model_validator(mode="after")
    def _require_growing_batches_and_a_target(self) -> Self:
        if not self.smallest_batch <= self.best_batch <= self.largest_batch:
            raise value_error("batch_sizes_shrink")
        if not self.requirements():
            raise value_error("targets_off")
        return self

    @model_serializer(mode="wrap")
    def _serialize_targets_first(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        targets = {name: fields.pop(name) for name in self.__pydantic_extra__ if name in fields}
        return targets | fields

    def requirements(self) -> dict[str, Requirement]:
        """Return whether each ordered target is required or optional, by the target's name."""
        by_name = {item.name: self._get_requirement(item) for item in TARGETS.values()}
        return {name: requirement for name, requirement in by_name.items() if requirement != "off"}

    def _get_requirement(self, target: Target) -> Requirement:
        return self.__pydantic_extra__.get(target.field, "off")

    def list_compared_targets(self) -> tuple[str, ...]:
        """Return the ordered targets for which the result is compared with the untouched model.

        These are the targets that recpress can measure. If the order has none of them, the only
        compared target is the default target, whose bytes the report compares.
        """
        measured = tuple(name for name in self.requirements() if TARGETS[name].is_measured)
        return measured or (default_target().name,)

    def batch_sizes(self) -> BatchSizes:
        """Return the batch sizes for which engines are built."""
        return BatchSizes(low=self.smallest_batch, best=self.best_batch, high=self.largest_batch)


class Terms(Frozen):
    """Compress a model, compare the result with the limits for each target, and register it."""

    # The docstring says what an order does, because it is the description in the JSON schema.
    # Prefect's form shows the fields in the sequence of their "position".

    model: str = Field(
        min_length=1,
        title="Model",
        description="A bundle in the store: name@version, name (its newest), or an artifact URI.",
        json_schema_extra={"position": 0},
    )
    preset: Preset = Field(
        "safe",
        title="Preset",
        description="safe: int8 tables, float16 layers. fast: int8 tables and layers. small: int4 "
        "tables, int8 layers; rarely used rows share one vector; a quarter of the dense channels "
        "is kept, then trained by distillation. smallest: like small, with fewer channels. custom: "
        "the steps below. Pruning in small and smallest loses at most the quality budget. Each "
        "preset results in at most the bytes of the preset before it.",
        json_schema_extra={"position": 1},
    )
    limits: tuple[Limit, ...] = Field(
        min_length=1,
        title="Limits",
        description="Bounds on the measurements of the result; at least one. A common first limit: "
        "auc, against baseline, at_least -0.002.",
        json_schema_extra={"position": 2},
    )
    targets: Targets = Field(
        default_factory=Targets, title="Targets", json_schema_extra={"position": 3}
    )
    # Requirements on the data beyond its signature, such as the least number of rows.
    rules: Rules = Field(
        default_factory=Rules, title="Data rules", json_schema_extra={"position": 5}
    )
    promote: bool = Field(
        False,
        title="Promote if accepted",
        description="Make the result champion immediately if every limit holds.",
        json_schema_extra={"position": 6},
    )
    seed: int = Field(0, ge=0, json_schema_extra={"position": 7})
    attempt: int = Field(
        0,
        ge=0,
        title="Attempt",
        description="Increase it to run the same order again, as a new version.",
        json_schema_extra={"position": 8},
    )

    budget: float | None = Field(
        None,
        ge=0,
        title="Quality budget",
        description="Largest loss of the model's metric on validation rows, such as 0.001. Steps "
        "that would lose more are left out, with the training that follows them. Default: 0.001 "
        "for the pruning of presets small and smallest, no budget for the others.",
        json_schema_extra={"position": 9},
    )

    teachers: tuple[str, ...] = Field(
        (),
        title="Other teachers",
        description="Steps that learn from predictions use the average of the predictions of the "
        "original and of these: bundles in the store, registry:name@version, or column:NAME for "
        "scores in the data.",
        json_schema_extra={"position": 10},
    )

    @field_validator("limits")
    @classmethod
    def _require_meaningful_limits(cls, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        if problems := limit_problems(limits):
            raise value_error("limits_not_meant", reasons=problems)
        return limits

    def quality_budget(self) -> float | None:
        """Return the largest loss of the metric on validation rows; None if there is no budget."""
        if self.budget is None and self.preset in ("small", "smallest"):
            return DEFAULT_BUDGET
        return self.budget

    def compares_with_champion(self) -> bool:
        """Return whether any limit compares with the champion."""
        return any(limit.against == "champion" for limit in self.limits)

    def custom_steps(self) -> list[dict[str, Any]]:
        """Return no steps: only ``Order`` has custom steps."""
        return []
