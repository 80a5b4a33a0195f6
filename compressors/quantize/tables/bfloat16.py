"""Embedding tables as bfloat16: half the bytes, float32's range, three decimal digits.

A weight has 8 significant bits; in float16 it has 11. Use ``float16`` unless weights are above
65,504 or below 6e-5, where float16 overflows or loses precision. Rows are looked up as stored and
converted to float32 after the lookup.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from compressors.core.modules.formats import TableFormat
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.errors.steps import ValueNotStorable
from compressors.quantize.kernels.short_floats import short_float_table_format


def encode(table: Tensor) -> Tensor:
    """Round weights ``(rows, dim)`` to bfloat16.

    Raises:
        ValueNotStorable: a weight near float32's largest number rounds to infinity.
    """
    short = table.to(torch.bfloat16)
    if not bool(torch.isfinite(short).all()):
        raise ValueNotStorable("weight_beyond_bfloat16", weight=float(table.abs().max()))
    return short


FORMAT = short_float_table_format("bfloat16", torch.bfloat16)


class BFloat16(StepSettings):
    """Store embedding tables as bfloat16."""

    kind: Literal["bfloat16"] = "bfloat16"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """Return no settings: the format has none."""
        return {}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Return no parameters: each weight is rounded independently."""
        return {}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode one block of rows, float ``(rows, dim)``, to its stored tensors."""
        return {"weight": encode(block)}
