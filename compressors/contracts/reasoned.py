"""The base class of decisions that have reasons, as codes and fields."""

from typing import Any, Self

from pydantic import Field, ModelWrapValidatorHandler, computed_field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.reasons import Reason, join_reasons, read_reasons


class Reasoned(Frozen):
    """A decision with its reasons.

    In JSON, ``reasons`` is a list of codes and fields, and ``reason`` is the text of all their
    sentences. Documents of earlier versions have only ``reason``, which is read as one reason with
    code ``as_written``.
    """

    reasons: tuple[Reason, ...] = Field(min_length=1)

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def reason(self) -> str:
        """The sentences of the reasons, joined with semicolons."""
        return join_reasons(self.reasons)

    @model_validator(mode="wrap")
    @classmethod
    def _read_sentence(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        return read_reasons(data, validate, "reason", "reasons")
