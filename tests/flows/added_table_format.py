"""A table format that only tests define: the sign of each weight, and one scale for each row."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressors.core.modules.formats import TableFormat, TensorSpec
from compressors.core.registries import METHODS, TABLE_FORMATS, register
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns


@dataclass(frozen=True)
class SignsFormat:
    """Stores ``signs`` int8 ``(rows, dim)``, -1 or 1, and ``scale`` float32 ``(rows,)``.

    ``learned`` are the names of the stored tensors that training may change: none.
    """

    name: str = "signs"
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        signs = TensorSpec((rows, dim), torch.int8)
        return {"signs": signs, "scale": TensorSpec((rows,), torch.float32)}

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        return stored["signs"][ids].float() * stored["scale"][ids].unsqueeze(-1)


SIGNS = SignsFormat()


class Signs(StepSettings):
    """Store the sign of each weight, and the mean absolute weight of each row."""

    kind: Literal["signs"] = "signs"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1

    # The next four functions are the protocol of a method that encodes tables in blocks of rows.

    @property
    def storage(self) -> TableFormat:
        return SIGNS

    def settings(self) -> dict[str, Any]:
        return {}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        signs = torch.where(block < 0, -1, 1).to(torch.int8)
        return {"signs": signs, "scale": block.abs().mean(dim=1)}


@contextmanager
def registered_table_format() -> Iterator[None]:
    """Register the method and its format within the context."""
    register(Signs, SIGNS)
    try:
        yield
    finally:
        del METHODS["signs"], TABLE_FORMATS[SIGNS.name]
