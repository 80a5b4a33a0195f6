"""Which composition of smaller tables loses least AUC at equal bytes?

A composition replaces a table by smaller tables ("parts"), such as the two factors of a low-rank
table, or a table of codes and the layers of the small network that decodes them (``neural_codes``).
``docs/methods.md`` links to a page for each composition.
The benchmark composes the tables of the demo's model (``recpress demo``: DCN-v2 on MovieLens 100K),
or those of another bundle. It prints

- the bytes of all tables as a share of float32;
- the squared error relative to the variance of the rows, unweighted and weighted by the lookup
  counts of the training data;
- the change of AUC on validation rows.

Each composition is measured with parts in float32, 8 and 4 bits, and after distillation with parts
in float32 and 4 bits. The same validation rows select the best epoch of the distillation.
Compositions in a group, such as 1/4, keep about this share of the bytes per row. The labels of
``dimensions`` have the importance by which it selects the kept dimensions: their variance over all
rows (default), the same with rows weighted by lookup counts ("lookups"), or the estimated change of
the loss ("gradient").

    recpress demo && python -m benchmarks.table_forms [BUNDLE]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.distill_settings import evaluate_auc
from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.steps.step import Step, TableStep
from compressors.core.units import Unit
from compressors.distill.distill import Distill
from compressors.distill.training.settings import Training
from compressors.factorize.low_rank import LowRank
from compressors.factorize.multi_hash import MultiHash
from compressors.factorize.neural_codes import NeuralCodes
from compressors.factorize.quotient_remainder import QuotientRemainder
from compressors.prune.tables.dimensions import Dimensions
from compressors.quantize.calibration.lookup_counts import lookup_counts
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.cli.demo import BUNDLE
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.loading import build_bench, fetch_split, load_bundle
from tasks.prepare import prepare
from tasks.score import score

# How the parts are quantized; None leaves them in float32.
PART_STEPS: tuple[TableStep | None, ...] = (None, RowwiseInt8(), RowwiseInt4())
SPLITS = ("train", "validation")
TABLE_L2 = 0.05  # as in the demo's training


def build_steps_by_share(dim: int) -> dict[str, tuple[Step, ...]]:
    """Return the compared steps for tables of width ``dim``, by the share of bytes they keep."""
    steps: dict[str, tuple[Step, ...]] = {}
    for share in (0.5, 0.25, 0.125):
        numbers = max(1, round(share * dim))  # stored per row
        steps[f"1/{round(1 / share)}"] = (
            LowRank(rank=numbers),
            LowRank(rank=numbers, weighted=True),
            Dimensions(keep=numbers),
            Dimensions(keep=numbers, importance="lookups"),
            Dimensions(keep=numbers, importance="gradient"),
            NeuralCodes(codes=numbers),
            NeuralCodes(codes=numbers, weighted=True),
            QuotientRemainder(buckets=share),
            QuotientRemainder(buckets=share, weighted=True),
            QuotientRemainder(buckets=share, operation="multiply", weighted=True),
            MultiHash(buckets=share),
            MultiHash(buckets=share, weighted=True),
        )
    return steps


def format_step(step: Step) -> str:
    """Format the step's kind and the settings that distinguish it within its group."""
    shown = ("importance", "operation", "weighted", "signed")
    settings = {name: getattr(step, name) for name in shown if name in step.model_fields_set}  # type: ignore[attr-defined]
    words = [name if value is True else str(value) for name, value in settings.items()]
    return " ".join([f"`{step.kind}`", *words])


def look_up_all_rows(model: Model) -> dict[str, Tensor]:
    """Return by table all rows as a lookup returns them, float64 ``(rows, dim)``."""
    tables = {}
    for unit in Unit.of(model.module):
        if unit.role != "table" or unit.part_of is not None:
            continue
        module = getattr(unit.module, "table", unit.module)
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            tables[unit.name] = module.weight.detach().double()
        else:
            with torch.no_grad():
                tables[unit.name] = module(torch.arange(unit.rows)).double()
    return tables


def table_bytes(model: Model) -> int:
    """Return the stored bytes of all tables, including the parts of composed tables."""
    return sum(unit.bytes for unit in Unit.of(model.module) if unit.role == "table")


def relative_error(
    before: dict[str, Tensor], after: dict[str, Tensor], weight: dict[str, Tensor]
) -> float:
    """Return the weighted squared error of all rows, divided by their weighted variance.

    Args:
        before: original rows by table, ``(rows, dim)``.
        after: rows after compression.
        weight: weight of each row by table, ``(rows,)``; normalized here.
    """
    error_sum = variance_sum = 0.0
    for name, rows in before.items():
        share = (weight[name] / weight[name].sum()).unsqueeze(1)
        error_sum += float((share * (after[name] - rows).square()).sum())
        variance_sum += float((share * (rows - (share * rows).sum(dim=0)).square()).sum())
    return error_sum / variance_sum


def format_cells(
    model: Model, source: Model, bench: Bench, counts: dict[str, Tensor], auc: float
) -> str:
    """Format bytes, errors and change of AUC of one model as the last cells of its line."""
    before, after = look_up_all_rows(source), look_up_all_rows(model)
    uniform = {name: torch.ones(len(rows), dtype=torch.float64) for name, rows in before.items()}
    cells = (
        f"{table_bytes(model) / table_bytes(source):.1%}",
        f"{relative_error(before, after, uniform):.2%}",
        f"{relative_error(before, after, counts):.2%}",
        f"{evaluate_auc(model.module, bench) - auc:+.5f}",
    )
    return " | ".join(cells)


def main() -> None:
    """Print a Markdown table with one line per composition and format of its parts."""
    torch.set_num_threads(1)
    bundle_ref = find_bundle(sys.argv[1] if len(sys.argv) > 1 else BUNDLE)
    loaded = load_bundle(bundle_ref.artifact)
    rows = bundle_ref.rows
    # ``fn`` of a Prefect task calls its function directly, without a flow.
    prepared = {split: prepare.fn(bundle_ref.artifact, split) for split in SPLITS}
    splits = {split: fetch_split(artifact, rows[split]) for split, artifact in prepared.items()}
    soft = score.fn(bundle_ref.artifact, prepared["train"], rows["train"])
    splits["soft_labels"] = fetch_split(soft, rows["train"])
    bench = build_bench(loaded.manifest, splits, bundle_ref.artifact, seed=0)
    source = loaded.model
    units = [unit for unit in Unit.of(source.module) if unit.role == "table"]
    dim = units[0].weight.shape[1]
    # Not 0: the counts are divided by their sum, which is 0 for a table without lookups.
    counts = {k: v + 1e-9 for k, v in lookup_counts(source, bench, [u.name for u in units]).items()}
    auc = evaluate_auc(source.module, bench)
    distill = Distill(training=Training(tables=True, table_l2=TABLE_L2))
    print(f"AUC on validation rows as trained: {auc:.5f}; {table_bytes(source)} bytes of tables")
    print("| composition | parts | bytes | error | error weighted by lookups | change of AUC |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for number, part_step in enumerate(PART_STEPS[1:]):  # 8 and 4 bits
            assert part_step is not None
            quantized = run(part_step, source, bench, Path(scratch) / f"plain-{number}")
            cells = format_cells(quantized, source, bench, counts, auc)
            print(f"| none | `{part_step.kind}` | {cells} |")
        distilled = run(distill, source, bench, Path(scratch) / "distilled")
        print(
            f"| none | float32, distilled | {format_cells(distilled, source, bench, counts, auc)} |"
        )
        for group, steps in build_steps_by_share(dim).items():
            for number, step in enumerate(steps):
                folder = Path(scratch) / f"{group.replace('/', '-')}-{number}"
                composed = run(step, source, bench, folder)
                distilled = run(distill, composed, bench, folder / "distilled")
                for unquantized, part_steps in (
                    (composed, PART_STEPS),
                    (distilled, PART_STEPS[::2]),  # float32 and 4 bits
                ):
                    for part_step in part_steps:
                        kind = f"`{part_step.kind}`" if part_step else "float32"
                        if unquantized is distilled:
                            kind += ", distilled"
                        model = unquantized
                        if part_step is not None:
                            model = run(part_step, unquantized, bench, folder / kind.strip("`"))
                        cells = format_cells(model, source, bench, counts, auc)
                        print(f"| {format_step(step)} {group} | {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
