"""What is clipping worth in 4-bit tables?

On the demo's tables: the squared error against the weights, the AUC on the validation rows, and how
long encoding takes, for ranges that end at a row's largest weight and for those of least error.

    recpress demo && python -m benchmarks.int4_clipping
"""

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.distill_settings import auc_of
from compressors.step import run
from compressors.tables.rowwise_int4 import RowwiseInt4, decode, encode
from compressors.units import Unit
from flows.demo import BUNDLE
from tasks.loading import bench_of, load_bundle, split_of
from tasks.prepare import prepare
from tasks.subject import find

CLIPPINGS = ("min_max", "mse")
ROUNDS = 7


def main() -> None:
    """Print one line a way of clipping, as a Markdown table."""
    torch.set_num_threads(1)
    subject = find(BUNDLE)
    loaded = load_bundle(subject.artifact)
    made = prepare.fn(subject.artifact, "validation", "benchmark")
    held = {"validation": split_of(made, subject.rows["validation"])}
    bench = bench_of(loaded.manifest, held, subject.artifact, 0)
    tables = [unit.weight for unit in Unit.of(loaded.model.module) if unit.role == "table"]
    large = torch.randn(200_000, 64, generator=torch.Generator().manual_seed(0))
    before = auc_of(loaded.model.module, bench)
    times: dict[str, list[float]] = {clipping: [] for clipping in CLIPPINGS}
    for _ in range(ROUNDS):  # in turn, so that what slows the machine slows both
        for clipping in CLIPPINGS:
            begun = time.perf_counter()
            encode(large, "float16", clipping)
            times[clipping].append(time.perf_counter() - begun)
    print(f"AUC on validation rows as trained: {before:.5f}")
    print("| clipping | error, share of the weights' squares | change of AUC | time, ratio |")
    print("|---|---|---|---|")
    squares = sum(float(table.square().sum()) for table in tables)
    with tempfile.TemporaryDirectory() as scratch:
        for clipping in CLIPPINGS:
            error = 0.0
            for table in tables:
                codes, scale = encode(table, "float16", clipping)
                error += float((decode(codes, scale, table.shape[1]) - table).square().sum())
            step = RowwiseInt4(clipping=clipping)
            packed = run(step, loaded.model, bench, Path(scratch) / clipping)
            ratio = min(times[clipping]) / min(times["min_max"])
            change = auc_of(packed.module, bench) - before
            print(f"| {clipping} | {error / squares:.3%} | {change:+.5f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
