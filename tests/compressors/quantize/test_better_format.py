"""No step increases bytes; a row-wise format is replaced by a more precise one that is no larger.

``RANK`` is the precision of each format; a higher number is more precise.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import METHODS, Reference, default_step
from reason_codes import require_reason
from torch import Tensor, nn

from compressors.contracts import Bench, IdInput, Output, Signature, Split
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.core.steps.step import TableStep
from compressors.core.units import stored_bytes
from compressors.distill.recalibrate import Recalibrate
from compressors.errors.compression import CompressionError
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.better_format import RANK, Float16Rows, best_format, table_bytes
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

ROWWISE = (
    RowwiseInt8(),
    RowwiseInt8(symmetric=False),
    RowwiseInt8(scale="float32"),
    RowwiseInt4(),
    RowwiseInt4(symmetric=False),
    RowwiseInt4(scale="float32", symmetric=False),
    RowwiseInt4(rows_per_scale=4),
    RowwiseInt4(rows_per_scale=0),
    RowwiseInt2(),
    RowwiseInt2(symmetric=True),
    RowwiseInt2(rows_per_scale=0),
    Float8E4M3(),
)


class Net(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(rows, dim), nn.Linear(dim, 1)

    def forward(self, user: Tensor) -> Tensor:
        score: Tensor = self.out(self.table(user)).squeeze(1)
        return score


SIGNATURE = Signature(
    inputs=(IdInput(name="user", table="table"),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
ROWS = Split(path="", sha256="0" * 64, rows=10)  # a dry run reads no rows
BENCH = Bench(signature=SIGNATURE, train=ROWS, calibration=ROWS, validation=ROWS, soft_labels=ROWS)


def network(rows: int, dim: int) -> Reference:
    return Reference(Net, SIGNATURE, {"rows": rows, "dim": dim})


@pytest.mark.parametrize(
    "step", ROWWISE, ids=[f"{step.kind}-{number}" for number, step in enumerate(ROWWISE)]
)
def test_best_format_selects_the_most_precise_format_that_is_no_larger(step: TableStep) -> None:
    better = [
        o for o in (Float16Rows(), RowwiseInt8(), RowwiseInt4()) if RANK[o.kind] > RANK[step.kind]
    ]
    for dim in range(1, 17):
        for rows in range(1, 101):
            weight = torch.zeros(()).expand(rows, dim)
            chosen, reasons = best_format(step, weight)
            size = table_bytes(chosen, rows, dim)
            assert size <= table_bytes(step, rows, dim)
            for other in better:
                if RANK[other.kind] > RANK[chosen.kind]:
                    assert table_bytes(other, rows, dim) > size
            if chosen is not step:
                require_reason(
                    reasons, "better_format", format=chosen.kind, bytes=size, step=step.kind
                )


# Methods with the effect "values" change weights and keep all formats. Some of them export the
# network, which is slow, so they are tested with only two sizes.
SIZES = tuple(itertools.product((1, 2, 5, 16), (1, 2, 17, 100)))
SIZES_OF_VALUES = ((1, 1), (16, 100))


def size_cases() -> list[Any]:
    """Each method with its table sizes ``(dim, rows)``, as parameters of a test."""
    cases = []
    for method in METHODS:
        if method in (Tiers, Recalibrate):
            continue
        if method.effect == "values":
            cases.append(pytest.param(method, SIZES_OF_VALUES, id=method.__name__))
            cases.append(
                pytest.param(method, SIZES, id=f"{method.__name__}-all", marks=pytest.mark.nightly)
            )
        else:
            cases.append(pytest.param(method, SIZES, id=method.__name__))
    return cases


@pytest.mark.parametrize(("method", "sizes"), size_cases())
def test_no_step_increases_the_bytes_of_a_network_or_of_a_unit(method, sizes) -> None:
    """``tiers`` and ``recalibrate`` are excluded, because they add numbers to the network.

    ``tiers`` adds the position of each row in its two tables, ``recalibrate`` a map of the scores.
    """
    step = default_step(method)
    for dim, rows in sizes:
        source = network(rows, dim).model()
        try:
            result = dry_run(step, source, BENCH)
        except CompressionError:
            continue  # the step does not apply
        assert stored_bytes(result.module) <= stored_bytes(source.module), (dim, rows)
        assert result.plan is not None
        assert all(
            line.bytes_after <= line.bytes_before for line in result.plan.lines if line.bytes_before
        )


@pytest.mark.parametrize(
    "step", [RowwiseInt8(), RowwiseInt4(), RowwiseInt2()], ids=lambda s: s.kind
)
def test_a_table_of_one_column_is_stored_as_float16(step: TableStep, tmp_path: Path) -> None:
    reference = network(50, 1)
    source = reference.model()
    result = run(step, source, reference.bench(tmp_path / "data"), tmp_path / "out")
    assert result.plan is not None
    line = result.plan.of("table")
    assert line is not None
    assert (line.format, line.bytes_after) == ("float16", 100)
    require_reason(line.reasons, "better_format", step=step.kind, format="float16", bytes=100)
    assert dry_run(step, source, BENCH).plan == result.plan


def test_a_table_beyond_float16_is_stored_in_an_integer_format(tmp_path: Path) -> None:
    reference = network(50, 1)
    source = reference.model()
    with torch.no_grad():
        source.module.table.weight[3] = 1e5
    result = run(RowwiseInt4(), source, reference.bench(tmp_path / "data"), tmp_path / "out")
    assert result.plan is not None
    line = result.plan.of("table")
    assert line is not None
    assert line.format == "rowwise_int8"  # as many bytes as int4, and more precise
