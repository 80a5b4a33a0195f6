"""Bytes of the stages of a recipe (the models after each step), with and without plans.

A stage with a plan has the plan's bytes after the recipe. A stage without one has the bytes before
the recipe in the next stage's plan, or without such a plan the bytes of its stored tensors.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressors.contracts import Plan, PlanLine
from compressors.contracts.reasons import Reason
from tasks.stages import bytes_of_stages

REASONS = (Reason("dropped_if", step="s", metric="auc", most_loss=0.1),)  # any reason
STORED_BYTES = 24  # of the tensor below: 2 x 3 float32


def plan(before: int, after: int) -> Plan:
    """A plan with one table of these bytes before and after the recipe."""
    line = PlanLine(
        module="user",
        role="table",
        format="f",
        bytes_before=before,
        bytes_after=after,
        reasons=REASONS,
    )
    return Plan(lines=(line,))


@pytest.mark.parametrize(
    ("plans", "sizes"),
    [
        ([None], [STORED_BYTES]),
        ([plan(9, 5)], [5]),
        ([None, plan(9, 5), plan(9, 2)], [9, 5, 2]),
        ([plan(9, 5), plan(9, 2)], [5, 2]),
        ([None, None, plan(9, 2)], [STORED_BYTES, 9, 2]),
        ([None, plan(9, 5), None], [9, 5, STORED_BYTES]),
    ],
)
def test_every_stage_has_its_bytes_with_or_without_a_plan(
    plans: list[Plan | None], sizes: list[int], tmp_path: Path
) -> None:
    save_file({"user.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    assert bytes_of_stages(plans, [tmp_path] * len(plans)) == sizes
