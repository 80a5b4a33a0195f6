"""A table format is added by one file and one registration, and goes through a whole order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from drafts import write_draft
from orders import carry_out, surroundings
from torch import Tensor

from compressors.contracts import Limit
from compressors.core.modules.formats import Bag, PackedTable, TableFormat, TensorSpec
from compressors.core.registries import METHODS, TABLE_FORMATS, register
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from flows.order import Order
from tasks.bundles.loading import load_bundle
from tasks.bundles.packing import pack
from tasks.bundles.table_files import table_steps


@dataclass(frozen=True)
class SignsFormat:
    """``signs`` int8 ``(rows, dim)``, -1 or 1, and ``length`` float32 ``(rows,)``."""

    name: str = "signs"
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        signs = TensorSpec((rows, dim), torch.int8)
        return {"signs": signs, "length": TensorSpec((rows,), torch.float32)}

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        return stored["signs"][ids].float() * stored["length"][ids].unsqueeze(-1)


SIGNS = SignsFormat()


class Signs(StepSettings):
    """Store the sign of each weight, and the mean absolute weight of each row."""

    kind: Literal["signs"] = "signs"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1

    @property
    def storage(self) -> TableFormat:
        return SIGNS

    def settings(self) -> dict[str, Any]:
        return {}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        signs = torch.where(block < 0, -1, 1).to(torch.int8)
        return {"signs": signs, "length": block.abs().mean(dim=1)}


@pytest.fixture
def signs() -> Iterator[None]:
    register(Signs, SIGNS)
    yield
    del METHODS["signs"], TABLE_FORMATS["signs"]


def test_a_registered_table_format_is_stored_lowered_measured_and_published(
    signs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings(monkeypatch, tmp_path / "recpress")
    pack(write_draft(tmp_path / "draft"))
    order = Order.model_validate(
        {
            "model": "clicks@1",
            "preset": "custom",
            "steps": [{"kind": "signs"}],
            "limits": [Limit.parse("bytes vs baseline <= 0.99")],
        }
    )
    finished = carry_out(order).finished
    (target,) = finished.report.targets
    assert target.verdict.outcome == "accepted"
    loaded = load_bundle(finished.report.compressed).model
    assert loaded.plan is not None
    lines = [line for line in loaded.plan.lines if line.role == "table"]
    assert lines
    assert {line.format for line in lines} == {"signs"}
    for line in lines:
        module = loaded.module.get_submodule(line.module)
        table = module.table if isinstance(module, Bag) else module
        assert isinstance(table, PackedTable)
        assert line.bytes_after == table.rows * (table.dim + 4)
        assert set(np.unique(table.get_buffer("signs"))) <= {-1, 1}


def test_a_registered_table_format_is_offered_for_table_files(signs: None) -> None:
    assert table_steps()["signs"] is Signs
    assert "Signs" in Order.model_json_schema()["$defs"]


def test_a_method_is_registered_once(signs: None) -> None:
    with pytest.raises(ValueError, match="signs"):
        register(Signs)
