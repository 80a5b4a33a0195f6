"""What do tables of codes keep, at the bytes of row-wise ones and far below, also when refitted?

On the demo's tables: bytes, codebooks and scales included, and squared error, both as shares of the
float32 tables', and the change of AUC on the demo's test rows. The second table is after
``refit_codes``, the mean over five seeds of the order of rows with its 95 % interval; it chooses by
validation rows, and the test rows are only read here. Its first line says what the same training
does for the original.

    recpress demo && python -m benchmarks.table_codes
"""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch

from compressors.contracts import Bench, Split
from compressors.core.model import Model
from compressors.core.modules.formats import Bag, PackedTable
from compressors.core.runner import ModelStep, TableStep, run
from compressors.core.units import Unit
from compressors.distill.distill import Distill
from compressors.distill.refit_codes import RefitCodes
from compressors.distill.training.settings import Training
from compressors.metrics.validation_score import quality
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.cli.demo import BUNDLE
from tasks.bundles.bundle_ref import find
from tasks.bundles.loading import bench_of, load_bundle, split_of
from tasks.prepare import prepare
from tasks.score import score

SHARE = 0.05
STEPS: tuple[TableStep, ...] = (
    RowwiseInt8(),
    RowwiseInt4(),
    KMeans(),
    KMeans(bits=2),
    KMeans(bits=2, scale="none"),
    ProductCodes(parts=8, bits=4, codebook_share=SHARE),
    ProductCodes(parts=4, bits=4, codebook_share=SHARE),
    ResidualCodes(codebooks=8, bits=4, codebook_share=SHARE),
    ResidualCodes(codebooks=4, bits=4, codebook_share=SHARE, refine=0),
    ResidualCodes(codebooks=4, bits=4, codebook_share=SHARE),
    ResidualCodes(codebooks=2, bits=4, codebook_share=SHARE),
    RowwiseInt2(rows_per_scale=64),
)
REFITTED = (STEPS[4], STEPS[6], STEPS[10], STEPS[11])
SEEDS = 5
STUDENT = 2.776  # two-sided 95 % of Student's t with 4 degrees of freedom
# The demo's own penalty on its tables; rates of the default.
HOW = Training(epochs=3, learning_rate=3e-4, patience=1, table_l2=0.05)


def named(step: TableStep) -> str:
    """A step in a line: what is not its default."""
    told = step.model_dump(exclude_defaults=True, exclude={"kind"})  # type: ignore[attr-defined]
    return " ".join([f"`{step.kind}`", *(f"{key} {value}" for key, value in told.items())])


def bytes_and_error(before: Model, after: Model) -> tuple[float, float]:
    """Of all tables, as shares of the float32 ones."""
    whole = {unit.name: unit for unit in Unit.of(before.module) if unit.role == "table"}
    lost = squares = 0.0
    for unit in Unit.of(after.module):
        if unit.role != "table":
            continue
        weight = whole[unit.name].weight
        table = unit.module.table if isinstance(unit.module, Bag) else unit.module
        squares += float(weight.double().square().sum())
        if isinstance(table, PackedTable):
            with torch.no_grad():
                lost += float((table(torch.arange(unit.rows)) - weight).double().square().sum())
    size = sum(unit.bytes for unit in Unit.of(after.module) if unit.role == "table")
    return size / sum(unit.bytes for unit in whole.values()), lost / squares


def main() -> None:
    """Print both as Markdown tables."""
    torch.set_num_threads(1)
    logging.getLogger("compressors").setLevel(logging.WARNING)
    subject = find(BUNDLE)
    bundle, loaded = subject.artifact, load_bundle(subject.artifact)
    made = {part: prepare.fn(bundle, part, "benchmark") for part in ("train", "validation", "test")}
    soft = score.fn(bundle, made["train"], subject.rows["train"], "benchmark")
    held: dict[str, Split] = {part: split_of(at, subject.rows[part]) for part, at in made.items()}
    test = held.pop("test")
    held["soft_labels"] = split_of(soft, subject.rows["train"])
    bench = bench_of(loaded.manifest, held, bundle, 0)
    original = loaded.model
    before = quality(original.module, bench.signature, test)

    def change(model: Model) -> float:
        return quality(model.module, bench.signature, test) - before

    print(f"AUC on test rows as trained: {before:.5f}")
    print("| step | bytes | squared error | change of AUC |")
    print("|---|---|---|---|")
    packed = {}
    with tempfile.TemporaryDirectory() as scratch:
        for place, step in enumerate(STEPS):
            packed[step.kind, place] = run(step, original, bench, Path(scratch) / str(place))
            size, error = bytes_and_error(original, packed[step.kind, place])
            told = change(packed[step.kind, place])
            print(f"| {named(step)} | {size:.1%} | {error:.2%} | {told:+.5f} |", flush=True)
        print("| step, then refitted | bytes | before | codebooks only | codes as well |")
        print("|---|---|---|---|---|")
        taught = Distill(training=HOW.model_copy(update={"tables": True}))
        line = _over_seeds(lambda seed: _seeded(taught, original, bench, seed), change)
        print(f"| original, `distill` with tables | 100% | 0 | {line} | |", flush=True)
        for step in REFITTED:
            model = packed[step.kind, STEPS.index(step)]
            size, _ = bytes_and_error(original, model)
            refits = RefitCodes(training=HOW, share=0, rounds=1), RefitCodes(training=HOW)
            lines = [_over_seeds(_refitter(refit, model, bench), change) for refit in refits]
            told = change(model)
            print(f"| {named(step)} | {size:.1%} | {told:+.5f} | {' | '.join(lines)} |", flush=True)


def _refitter(step: ModelStep, model: Model, bench: Bench) -> Callable[[int], Model]:
    return lambda seed: _seeded(step, model, bench, seed)


def _seeded(step: ModelStep, model: Model, bench: Bench, seed: int) -> Model:
    with tempfile.TemporaryDirectory() as scratch:  # what is mapped stays readable
        return run(step, model, bench.model_copy(update={"seed": 100 * seed}), Path(scratch))


def _over_seeds(made: Callable[[int], Model], change: Callable[[Model], float]) -> str:
    found = [change(made(seed)) for seed in range(SEEDS)]
    return f"{mean(found):+.5f} ± {STUDENT * stdev(found) / SEEDS**0.5:.5f}"


if __name__ == "__main__":
    main()
