"""An order: which model, how small, for which targets, within which limits."""

from typing import Any, Self

from pydantic import Field, model_validator

from compressors.dense.float16 import Float16
from compressors.dense.static_int8 import StaticInt8
from compressors.steps import AnyStep
from compressors.tables.rowwise_int4 import RowwiseInt4
from compressors.tables.rowwise_int8 import RowwiseInt8
from flows.terms import Preset, Terms

PRESETS: dict[Preset, tuple[AnyStep, ...]] = {
    "small": (RowwiseInt4(), StaticInt8()),
    "fast": (RowwiseInt8(), StaticInt8()),
    "safe": (RowwiseInt8(), Float16()),
}


class Order(Terms):
    """Compress one model, judge what will be served, and register the result."""

    steps: tuple[AnyStep, ...] = Field(
        (),
        title="Steps",
        description="Only with preset 'custom': the recipe, in order.",
        json_schema_extra={"position": 4},
    )

    @model_validator(mode="after")
    def _steps_fit_the_preset(self) -> Self:
        if (self.preset == "custom") != bool(self.steps):
            raise ValueError(
                "preset 'custom' needs steps"
                if not self.steps
                else f"steps need preset 'custom'; found preset {self.preset!r}"
            )
        return self

    def recipe(self) -> tuple[AnyStep, ...]:
        """The steps that will run."""
        return self.steps if self.preset == "custom" else PRESETS[self.preset]

    def own_steps(self) -> list[dict[str, Any]]:
        """The steps of preset ``custom`` as plain values; none for the other presets."""
        return [step.model_dump(mode="json") for step in self.steps]
