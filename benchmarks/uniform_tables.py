"""What do bits, offsets, clipping and scales cost, and what are they worth, in tables?

On the demo's tables, for every format and way of fitting it: the bytes of all tables against
float32, the squared error against the weights' squares, the AUC on the validation rows with nothing
trained again, and how long encoding a large table takes against the symmetric int8 of the same run.
Then the same for scales that rows share, and for the other short floats.

    recpress demo && python -m benchmarks.uniform_tables
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distill_settings import auc_of
from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.modules.formats import Bag
from compressors.core.runner import TableStep, encode_table, run
from compressors.core.units import Unit
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.cli.demo import BUNDLE
from tasks.bundles.bundle_ref import find
from tasks.bundles.loading import bench_of, load_bundle, split_of
from tasks.prepare import prepare

METHODS = (RowwiseInt8, RowwiseInt4, RowwiseInt2)
RULES = ("min_max", "greedy", "mse")
SHARED = (1, 8, 64, 0)
LARGE = (20_000, 64)
ROUNDS = 3


def steps() -> Iterator[tuple[str, str, str, TableStep]]:
    """Every step measured, with its words: format, clipping and offset, scales."""
    settings: dict[str, Any]
    for method in METHODS:
        for symmetric in (True, False):
            for rule in RULES:
                settings = {"symmetric": symmetric, "clipping": rule}
                kind = f"{'symmetric' if symmetric else 'offset'}, {rule}"
                yield method().kind, kind, "float16 a row", method(**settings)
    for method in METHODS:
        for symmetric in (True, False):
            settings = {"symmetric": symmetric, "clipping": "mse"}
            kind = f"{'symmetric' if symmetric else 'offset'}, mse"
            yield method().kind, kind, "float32 a row", method(scale="float32", **settings)
            for rows in SHARED[1:]:
                scales = f"float16 for {rows} rows" if rows else "one for the table"
                yield method().kind, kind, scales, method(rows_per_scale=rows, **settings)
    for rows in SHARED:
        scales = {0: "one for the table", 1: "float16 a row"}.get(rows, f"float16 for {rows} rows")
        yield "float8_e4m3", "", scales, Float8E4M3(rows_per_scale=rows)
    yield "bfloat16", "", "", BFloat16()


def table_of(module: nn.Module) -> nn.Module:
    """The table itself, where it stands inside a bag."""
    return module.table if isinstance(module, Bag) else module


def measured(step: TableStep, model: Model, bench: Bench, folder: Path) -> tuple[float, ...]:
    """Share of the bytes and of the squares, and AUC on validation rows."""
    packed = run(step, model, bench, folder)
    before, after = (
        {unit.name: unit for unit in Unit.of(one.module) if unit.role == "table"}
        for one in (model, packed)
    )
    lost = squares = 0.0
    for name, unit in before.items():
        weight = unit.weight
        found: Tensor = table_of(after[name].module)(torch.arange(unit.rows))
        lost += float((found - weight).double().square().sum())
        squares += float(weight.double().square().sum())
    share = sum(unit.bytes for unit in after.values()) / sum(unit.bytes for unit in before.values())
    return share, lost / squares, auc_of(packed.module, bench)


def main() -> None:
    """Print one line a step, as a Markdown table."""
    torch.set_num_threads(1)
    subject = find(BUNDLE)
    loaded = load_bundle(subject.artifact)
    made = prepare.fn(subject.artifact, "validation", "benchmark")
    held = {"validation": split_of(made, subject.rows["validation"])}
    bench = bench_of(loaded.manifest, held, subject.artifact, 0)
    large = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    print(f"AUC on validation rows as trained: {auc_of(loaded.model.module, bench):.5f}")
    print("| format | levels | scales | bytes | error | change of AUC | time, ratio |")
    print("|---|---|---|---|---|---|---|")
    before = auc_of(loaded.model.module, bench)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (form, kind, scales, step) in enumerate(steps()):
            share, lost, auc = measured(step, loaded.model, bench, Path(scratch) / str(number))
            print(
                f"| `{form}` | {kind} | {scales} | {share:.1%} | {lost:.3%} | {auc - before:+.5f} "
                f"| {ratio(step, large):.1f} |",
                flush=True,
            )


def ratio(step: TableStep, large: Tensor) -> float:
    """Time to encode a large table, against plain int8 measured in turn with it."""
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for one in (step, RowwiseInt8()):
            begun = time.perf_counter()
            encode_table(one, large)
            times.append(time.perf_counter() - begun)
        ratios.append(times[0] / times[1])
    return median(ratios)


if __name__ == "__main__":
    main()
