"""How much AUC do tables of codes lose, before and after ``refit_codes``, next to row-wise tables?

Compresses the demo's tables. The first printed table has the bytes (including codebooks and scales)
and the squared error, both as shares of the float32 tables, and the change of AUC on the demo's
test rows. The second printed table has the change of AUC after ``refit_codes``, as mean over five
seeds of the row order with its 95 % interval. ``refit_codes`` selects its best epoch by validation
rows; only this benchmark reads the test rows. The first line of the second table applies the same
training to the original model.

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
from compressors.core.runner import run
from compressors.core.steps.step import Step, TableStep
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
from tasks.bundles.bundle_ref import find_bundle
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
STUDENT_T = 2.776  # two-sided 95 % of Student's t with 4 degrees of freedom
# The penalty on tables is that of the demo's training; all rates are defaults.
TRAINING = Training(epochs=3, learning_rate=3e-4, patience=1, table_l2=0.05)


def step_label(step: TableStep) -> str:
    """Format the step's kind and the settings that differ from their defaults."""
    settings = step.model_dump(exclude_defaults=True, exclude={"kind"})  # type: ignore[attr-defined]
    return " ".join([f"`{step.kind}`", *(f"{key} {value}" for key, value in settings.items())])


def bytes_and_error(before: Model, after: Model) -> tuple[float, float]:
    """Return bytes and squared error of all tables, as shares of the float32 tables."""
    originals = {unit.name: unit for unit in Unit.of(before.module) if unit.role == "table"}
    error = squares = 0.0
    for unit in Unit.of(after.module):
        if unit.role != "table":
            continue
        weight = originals[unit.name].weight
        table = unit.module.table if isinstance(unit.module, Bag) else unit.module
        squares += float(weight.double().square().sum())
        if isinstance(table, PackedTable):
            with torch.no_grad():
                error += float((table(torch.arange(unit.rows)) - weight).double().square().sum())
    size = sum(unit.bytes for unit in Unit.of(after.module) if unit.role == "table")
    return size / sum(unit.bytes for unit in originals.values()), error / squares


def main() -> None:
    """Print both Markdown tables."""
    torch.set_num_threads(1)
    logging.getLogger("compressors").setLevel(logging.WARNING)
    bundle_ref = find_bundle(BUNDLE)
    bundle, loaded = bundle_ref.artifact, load_bundle(bundle_ref.artifact)
    prepared = {part: prepare.fn(bundle, part) for part in ("train", "validation", "test")}
    soft = score.fn(bundle, prepared["train"], bundle_ref.rows["train"])
    splits: dict[str, Split] = {
        part: split_of(artifact, bundle_ref.rows[part]) for part, artifact in prepared.items()
    }
    test = splits.pop("test")
    splits["soft_labels"] = split_of(soft, bundle_ref.rows["train"])
    bench = bench_of(loaded.manifest, splits, bundle, 0)
    original = loaded.model
    before = quality(original.module, bench.signature, test)

    def change(model: Model) -> float:
        return quality(model.module, bench.signature, test) - before

    print(f"AUC on test rows as trained: {before:.5f}")
    print("| step | bytes | squared error | change of AUC |")
    print("|---|---|---|---|")
    compressed = {}
    with tempfile.TemporaryDirectory() as scratch:
        for index, step in enumerate(STEPS):
            compressed[step.kind, index] = run(step, original, bench, Path(scratch) / str(index))
            size, error = bytes_and_error(original, compressed[step.kind, index])
            auc_change = change(compressed[step.kind, index])
            print(
                f"| {step_label(step)} | {size:.1%} | {error:.2%} | {auc_change:+.5f} |", flush=True
            )
        print("| step | bytes | not refitted | codebooks refitted | codes refitted as well |")
        print("|---|---|---|---|---|")
        distill = Distill(training=TRAINING.model_copy(update={"tables": True}))
        line = _over_seeds(lambda seed: _run_with_seed(distill, original, bench, seed), change)
        print(f"| original, `distill` with tables | 100% | 0 | {line} | |", flush=True)
        for step in REFITTED:
            model = compressed[step.kind, STEPS.index(step)]
            size, _ = bytes_and_error(original, model)
            refits = RefitCodes(training=TRAINING, share=0, rounds=1), RefitCodes(training=TRAINING)
            lines = [_over_seeds(_refitter(refit, model, bench), change) for refit in refits]
            auc_change = change(model)
            print(
                f"| {step_label(step)} | {size:.1%} | {auc_change:+.5f} | {' | '.join(lines)} |",
                flush=True,
            )


def _refitter(step: Step, model: Model, bench: Bench) -> Callable[[int], Model]:
    return lambda seed: _run_with_seed(step, model, bench, seed)


def _run_with_seed(step: Step, model: Model, bench: Bench, seed: int) -> Model:
    # Memory-mapped files stay readable after they are deleted.
    with tempfile.TemporaryDirectory() as scratch:
        return run(step, model, bench.model_copy(update={"seed": 100 * seed}), Path(scratch))


def _over_seeds(build: Callable[[int], Model], change: Callable[[Model], float]) -> str:
    """Format the mean change of AUC over seeds with its 95 % interval."""
    changes = [change(build(seed)) for seed in range(SEEDS)]
    return f"{mean(changes):+.5f} ± {STUDENT_T * stdev(changes) / SEEDS**0.5:.5f}"


if __name__ == "__main__":
    main()
