"""Tokens: a text per row, which the bundle's tokenizer turns into a sequence of ids."""

from typing import Literal, Self

from pydantic import Field, model_validator

from compressors.contracts.inputs.sequence_input import SequenceInput
from compressors.contracts.value_errors import value_error


class TokensInput(SequenceInput):
    """The token ids of one text per row: a sequence whose ids a tokenizer computes.

    ``columns`` names one column of strings, and ``shape`` is ``(longest,)``: longer texts are
    truncated. The model receives the tensors of a sequence, under the names that are given here.
    By default the mask is int64, as encoders in the style of BERT expect it.

    Attributes:
        tokenizer: name of the tokenizer among the bundle's ``transforms`` (files that convert raw
            values to ids): a ``tokenizer.json`` of the library ``tokenizers``.
        token_types: name of the tensor int64 ``(rows, length)`` with the segment of each token. A
            row has one text, so it is 0 everywhere.
    """

    kind: Literal["tokens"] = "tokens"  # type: ignore[assignment]  # a sequence of another kind
    tokenizer: str = Field("tokenizer.json", min_length=1)
    mask_dtype: Literal["bool", "float32", "int64"] = "int64"
    token_types: str | None = None

    @model_validator(mode="after")
    def _require_independent_length(self) -> Self:
        if self.same_length_as is not None:
            raise value_error("tokens_share_length", name=self.name, other=self.same_length_as)
        return self

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors: those of a sequence, and the token types if declared."""
        types = () if self.token_types is None else (self.token_types,)
        return (*super().tensors, *types)
