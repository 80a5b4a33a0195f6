"""How much AUC do tables of codebook codes lose, before and after the step ``refit_codes``?

A table of codebook codes stores, for each row, indices of codebook entries. ``refit_codes`` trains
the codebooks and selects new codes.

Compresses the embedding tables of the demo's model (``recpress demo``: DCN-v2 on MovieLens 100K),
with row-wise formats for comparison. The first printed table has the bytes (including codebooks and
scales) and the squared error, both as shares of the float32 tables, and the change of AUC on the
demo's test rows.

The second printed table has the change of AUC after ``refit_codes``, as mean over five seeds of the
row order ± half the width of its 95 % interval. ``refit_codes`` selects its best epoch by
validation rows; test rows are used only for printed results. The first line of the second table is
the original model after the same training.

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
from tasks.bundles.loading import build_bench, fetch_split, load_bundle
from tasks.prepare import prepare
from tasks.score import score

CODEBOOK_SHARE = 0.05  # largest bytes of a table's codebooks, as a share of its float32 bytes
# A row is stored as ``parts`` or ``codebooks`` codes of ``bits`` bits: product codes replace each
# of the row's parts by a codebook entry, residual codes sum one entry of each codebook.
# ``refine=0``: a codebook is only fitted to the residuals of those before it; by default all are
# then fitted together.
STEPS: tuple[TableStep, ...] = (
    RowwiseInt8(),
    RowwiseInt4(),
    KMeans(),
    KMeans(bits=2),
    KMeans(bits=2, scale="none"),
    ProductCodes(parts=8, bits=4, codebook_share=CODEBOOK_SHARE),
    ProductCodes(parts=4, bits=4, codebook_share=CODEBOOK_SHARE),
    ResidualCodes(codebooks=8, bits=4, codebook_share=CODEBOOK_SHARE),
    ResidualCodes(codebooks=4, bits=4, codebook_share=CODEBOOK_SHARE, refine=0),
    ResidualCodes(codebooks=4, bits=4, codebook_share=CODEBOOK_SHARE),
    ResidualCodes(codebooks=2, bits=4, codebook_share=CODEBOOK_SHARE),
    RowwiseInt2(rows_per_scale=64),
)
# kmeans with 2 bits and no scales; the product codes and the residual codes with the fewest bytes;
# 2 bits with one scale for 64 rows.
REFITTED_STEPS = (STEPS[4], STEPS[6], STEPS[10], STEPS[11])
SEEDS = 5
STUDENT_T = 2.776  # two-sided 95 % of Student's t with 4 degrees of freedom
# The default training of ``refit_codes``, with the demo's L2 penalty on tables.
TRAINING = Training(epochs=3, learning_rate=3e-4, patience=1, table_l2=0.05)


def format_step(step: TableStep) -> str:
    """Format the step's kind and the settings that differ from their defaults."""
    settings = step.model_dump(exclude_defaults=True, exclude={"kind"})  # type: ignore[attr-defined]
    return " ".join([f"`{step.kind}`", *(f"{key} {value}" for key, value in settings.items())])


def measure_tables(before: Model, after: Model) -> tuple[float, float]:
    """Return bytes and squared error of all tables, as shares of the float32 tables.

    A ``PackedTable`` is a compressed table; other tables stay in float32 and have no error. A
    ``Bag`` is a table whose rows are pooled.
    """
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
    prepared = {name: prepare.fn(bundle, name) for name in ("train", "validation", "test")}
    soft = score.fn(bundle, prepared["train"], bundle_ref.rows["train"])
    splits: dict[str, Split] = {
        name: fetch_split(artifact, bundle_ref.rows[name]) for name, artifact in prepared.items()
    }
    test = splits.pop("test")
    splits["soft_labels"] = fetch_split(soft, bundle_ref.rows["train"])
    bench = build_bench(loaded.manifest, splits, bundle, seed=0)
    original = loaded.model
    before = quality(original.module, bench.signature, test)

    def auc_change(model: Model) -> float:
        return quality(model.module, bench.signature, test) - before

    print(f"AUC on test rows as trained: {before:.5f}")
    print("| step | bytes | squared error | change of AUC |")
    print("|---|---|---|---|")
    compressed = {}
    with tempfile.TemporaryDirectory() as scratch:
        for index, step in enumerate(STEPS):
            compressed[step.kind, index] = run(step, original, bench, Path(scratch) / str(index))
            size, error = measure_tables(original, compressed[step.kind, index])
            change = auc_change(compressed[step.kind, index])
            print(f"| {format_step(step)} | {size:.1%} | {error:.2%} | {change:+.5f} |", flush=True)
        print("| step | bytes | not refitted | codebooks refitted | codes refitted as well |")
        print("|---|---|---|---|---|")
        distill = Distill(training=TRAINING.model_copy(update={"tables": True}))
        cell = _format_changes(
            lambda seed: _run_with_seed(distill, original, bench, seed), auc_change
        )
        print(f"| original, `distill` with tables | 100% | 0 | {cell} | |", flush=True)
        for step in REFITTED_STEPS:
            model = compressed[step.kind, STEPS.index(step)]
            size, _ = measure_tables(original, model)
            # A share of 0 selects no new codes: only codebooks or scales are trained.
            refits = RefitCodes(training=TRAINING, share=0, rounds=1), RefitCodes(training=TRAINING)
            cells = [
                _format_changes(_refit_with_seed(refit, model, bench), auc_change)
                for refit in refits
            ]
            change = auc_change(model)
            print(
                f"| {format_step(step)} | {size:.1%} | {change:+.5f} | {' | '.join(cells)} |",
                flush=True,
            )


def _refit_with_seed(step: Step, model: Model, bench: Bench) -> Callable[[int], Model]:
    """Return a function of a seed that applies a step to a model."""
    return lambda seed: _run_with_seed(step, model, bench, seed)


def _run_with_seed(step: Step, model: Model, bench: Bench, seed: int) -> Model:
    """Apply a step to a model, with a seed for the order of the training rows.

    Each round of ``refit_codes`` adds its number to the bench's seed; the factor 100 keeps the
    seeds of different runs apart.
    """
    # Memory-mapped files stay readable after they are deleted.
    with tempfile.TemporaryDirectory() as scratch:
        return run(step, model, bench.model_copy(update={"seed": 100 * seed}), Path(scratch))


def _format_changes(build: Callable[[int], Model], auc_change: Callable[[Model], float]) -> str:
    """Build a model with each seed, and format the mean change of AUC with its 95 % interval."""
    changes = [auc_change(build(seed)) for seed in range(SEEDS)]
    return f"{mean(changes):+.5f} ± {STUDENT_T * stdev(changes) / SEEDS**0.5:.5f}"


if __name__ == "__main__":
    main()
