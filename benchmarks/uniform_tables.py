"""How do bits, offsets, clipping and scales of table formats affect bytes, error and AUC?

Quantizes the tables of the demo's model (``recpress demo``: DCN-v2 on MovieLens 100K) uniformly to
8, 4 and 2 bits with several combinations of settings, including scales that several rows share, and
to float8 and bfloat16. Prints the bytes of all tables as a share of float32, the squared error as a
share of the squared weights, the change of AUC on validation rows without further training, and the
time to encode a large table divided by that of symmetric int8.

A clipping rule chooses the range of weights that share a scale
(``compressors/quantize/kernels/clipping.py``): ``min_max`` clips no weight, ``greedy`` and ``mse``
search for a range with a smaller squared error. Levels are the numbers that a quantized weight can
have; "symmetric" levels have no offset.

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

from benchmarks.distill_settings import evaluate_auc
from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.modules.formats import Bag
from compressors.core.runner import run
from compressors.core.steps.step import TableStep
from compressors.core.steps.table_encoder import encode_table
from compressors.core.units import Unit
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.cli.demo import BUNDLE
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.loading import build_bench, fetch_split, load_bundle
from tasks.prepare import prepare

METHODS = (RowwiseInt8, RowwiseInt4, RowwiseInt2)
CLIPPING_RULES = ("min_max", "greedy", "mse")
ROWS_PER_SCALE = (1, 8, 64, 0)  # 0: one scale for the whole table
TIMED_SHAPE = (20_000, 64)  # rows and width of the table that is encoded to measure the time
ROUNDS = 3


def generate_labeled_steps() -> Iterator[tuple[str, str, str, TableStep]]:
    """Yield every step after its labels: format, levels (offset and clipping rule), scales."""
    settings: dict[str, Any]
    for method in METHODS:
        for symmetric in (True, False):
            for rule in CLIPPING_RULES:
                settings = {"symmetric": symmetric, "clipping": rule}
                levels = f"{'symmetric' if symmetric else 'offset'}, {rule}"
                yield method().kind, levels, "float16 per row", method(**settings)
    for method in METHODS:
        for symmetric in (True, False):
            settings = {"symmetric": symmetric, "clipping": "mse"}
            levels = f"{'symmetric' if symmetric else 'offset'}, mse"
            yield method().kind, levels, "float32 per row", method(scale="float32", **settings)
            for rows in ROWS_PER_SCALE[1:]:
                scales = f"float16 for {rows} rows" if rows else "one for the table"
                yield method().kind, levels, scales, method(rows_per_scale=rows, **settings)
    for rows in ROWS_PER_SCALE:
        scales = {0: "one for the table", 1: "float16 per row"}.get(
            rows, f"float16 for {rows} rows"
        )
        yield "float8_e4m3", "", scales, Float8E4M3(rows_per_scale=rows)
    yield "bfloat16", "", "", BFloat16()


def unwrap_bag(module: nn.Module) -> nn.Module:
    """Return the table of a bag, or the module itself if it is a table."""
    return module.table if isinstance(module, Bag) else module


def measure(step: TableStep, model: Model, bench: Bench, folder: Path) -> tuple[float, ...]:
    """Return the share of bytes, the relative squared error, and the AUC on validation rows."""
    compressed = run(step, model, bench, folder)
    before, after = (
        {unit.name: unit for unit in Unit.of(version.module) if unit.role == "table"}
        for version in (model, compressed)
    )
    error = squares = 0.0
    for name, unit in before.items():
        weight = unit.weight
        dequantized: Tensor = unwrap_bag(after[name].module)(torch.arange(unit.rows))
        error += float((dequantized - weight).double().square().sum())
        squares += float(weight.double().square().sum())
    share = sum(unit.bytes for unit in after.values()) / sum(unit.bytes for unit in before.values())
    return share, error / squares, evaluate_auc(compressed.module, bench)


def main() -> None:
    """Print a Markdown table with one line per step."""
    torch.set_num_threads(1)
    bundle_ref = find_bundle(BUNDLE)
    loaded = load_bundle(bundle_ref.artifact)
    prepared = prepare.fn(bundle_ref.artifact, "validation")
    splits = {"validation": fetch_split(prepared, bundle_ref.rows["validation"])}
    bench = build_bench(loaded.manifest, splits, bundle_ref.artifact, seed=0)
    large = torch.randn(TIMED_SHAPE, generator=torch.Generator().manual_seed(0))
    print(f"AUC on validation rows as trained: {evaluate_auc(loaded.model.module, bench):.5f}")
    print("| format | levels | scales | bytes | error | change of AUC | time / int8 |")
    print("|---|---|---|---|---|---|---|")
    before = evaluate_auc(loaded.model.module, bench)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (storage, levels, scales, step) in enumerate(generate_labeled_steps()):
            share, error, auc = measure(step, loaded.model, bench, Path(scratch) / str(number))
            print(
                f"| `{storage}` | {levels} | {scales} | {share:.1%} | {error:.3%} "
                f"| {auc - before:+.5f} | {measure_relative_encode_time(step, large):.1f} |",
                flush=True,
            )


def measure_relative_encode_time(step: TableStep, large: Tensor) -> float:
    """Return the time to encode a large table divided by that of int8, as median over rounds."""
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for encoder in (step, RowwiseInt8()):
            start = time.perf_counter()
            encode_table(encoder, large)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return median(ratios)


if __name__ == "__main__":
    main()
