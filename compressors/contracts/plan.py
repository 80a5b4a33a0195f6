"""The plan of a recipe (a list of compression steps): one line for each table and dense layer.

The tables and dense layers of a network are called its units.
"""

from typing import Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, computed_field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.reasoned import Reasoned
from compressors.contracts.reasons import Reason, join_reasons, read_reasons

DROPPED = "dropped"
"""The format of a table or layer that was removed."""


class PlanLine(Reasoned):
    """The decision of a recipe for one table or dense layer, with its reasons.

    Attributes:
        module: attribute path of the table or layer.
        role: ``table`` or ``dense``; ``other`` for a recalibration of the output, and for the line
            of all other tensors, such as norms and biases.
        format: name of the storage format after the recipe.
        bytes_before: size before the recipe.
        bytes_after: size after the recipe.
        warnings: possible problems of the result; in JSON, ``warning`` is the text of their
            sentences.
    """

    module: str
    role: Literal["table", "dense", "other"]
    format: str
    bytes_before: int = Field(ge=0)
    bytes_after: int = Field(ge=0)
    steps: tuple[str, ...] = Field((), description="The steps that changed it, in order.")
    warnings: tuple[Reason, ...] = ()

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def warning(self) -> str | None:
        """The sentences of the warnings, joined with semicolons; None if there is no warning."""
        return join_reasons(self.warnings) or None

    @model_validator(mode="wrap")
    @classmethod
    def _read_warning(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        return read_reasons(data, validate, "warning", "warnings")


class Plan(Frozen):
    """The lines of a recipe's plan: one for every table and every dense layer.

    ``reasons`` say which steps changed nothing and which units a step had to skip. In JSON,
    ``remarks`` are their sentences.
    """

    lines: tuple[PlanLine, ...] = ()
    reasons: tuple[Reason, ...] = ()

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def remarks(self) -> tuple[str, ...]:
        """The reasons as sentences."""
        return tuple(map(str, self.reasons))

    @model_validator(mode="wrap")
    @classmethod
    def _read_remarks(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        return read_reasons(data, validate, "remarks", "reasons")

    @property
    def bytes_before(self) -> int:
        """The bytes of all weights before the recipe."""
        return sum(line.bytes_before for line in self.lines)

    @property
    def bytes_after(self) -> int:
        """The bytes of all weights after the recipe."""
        return sum(line.bytes_after for line in self.lines)

    def of(self, module: str) -> PlanLine | None:
        """Return the line of one module, or None."""
        return next((line for line in self.lines if line.module == module), None)
