"""The plan of a recipe: one line for each table and dense layer. Types only."""

from typing import Literal

from pydantic import Field

from compressors.contracts.inputs import Frozen

DROPPED = "dropped"
"""The format of a table or layer that is gone."""


class PlanLine(Frozen):
    """What a recipe decided for one table or dense layer, and why."""

    module: str
    role: Literal["table", "dense", "other"]
    format: str
    bytes_before: int = Field(ge=0)
    bytes_after: int = Field(ge=0)
    steps: tuple[str, ...] = Field((), description="The steps that changed it, in order.")
    reason: str
    warning: str | None = Field(None, description="What may be wrong with the result, and why.")


class Plan(Frozen):
    """One explicit line for every table and every dense layer.

    ``remarks`` are sentences about a step that no line shows: a step that changed nothing, a unit
    that a step had to skip.
    """

    lines: tuple[PlanLine, ...] = ()
    remarks: tuple[str, ...] = ()

    def of(self, module: str) -> PlanLine | None:
        """The line of one module, or None."""
        return next((line for line in self.lines if line.module == module), None)
