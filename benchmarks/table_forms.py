"""Which form of table made of smaller tables loses least, byte for byte?

On the demo's tables, or those of any bundle: bytes of all tables against float32, squared error
against the squares of the rows about their mean (each row alike, and by its lookups in training),
and the change of AUC on the validation rows; alone, with the parts stored in 8 or 4 bits, and after
distillation with tables (whose best epoch is chosen on the same rows) in float32 and 4 bits. Forms
stand in groups of about equal bytes of numbers that belong to rows.

    recpress demo && python -m benchmarks.table_forms [BUNDLE]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.distill_settings import auc_of
from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.runner import ModelStep, TableStep, run
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
from tasks.bundles.bundle_ref import find
from tasks.bundles.loading import bench_of, load_bundle, split_of
from tasks.prepare import prepare
from tasks.score import score

PACKERS: tuple[TableStep | None, ...] = (None, RowwiseInt8(), RowwiseInt4())
PARTS = ("train", "validation")
TABLE_L2 = 0.05  # as the demo's own training had it


def groups(dim: int) -> dict[str, tuple[ModelStep, ...]]:
    """Forms at about the same share of a table's bytes, by that share."""
    found: dict[str, tuple[ModelStep, ...]] = {}
    for share in (0.5, 0.25, 0.125):
        numbers = max(1, round(share * dim))
        found[f"1/{round(1 / share)}"] = (
            LowRank(rank=numbers),
            LowRank(rank=numbers, weighted=True),
            Dimensions(keep=numbers),
            Dimensions(keep=numbers, importance="traffic"),
            Dimensions(keep=numbers, importance="gradient"),
            NeuralCodes(codes=numbers),
            NeuralCodes(codes=numbers, weighted=True),
            QuotientRemainder(buckets=share),
            QuotientRemainder(buckets=share, weighted=True),
            QuotientRemainder(buckets=share, operation="multiply", weighted=True),
            MultiHash(buckets=share),
            MultiHash(buckets=share, weighted=True),
        )
    return found


def told(step: ModelStep) -> str:
    """A step in a few words: its kind and what tells it from its neighbours."""
    named = ("importance", "operation", "weighted", "signed")
    given = {name: getattr(step, name) for name in named if name in step.model_fields_set}  # type: ignore[attr-defined]
    words = [name if value is True else str(value) for name, value in given.items()]
    return " ".join([f"`{step.kind}`", *words])


def rows_of(model: Model) -> dict[str, Tensor]:
    """Every table's rows as a lookup gives them, float64 ``(rows, dim)``."""
    found = {}
    for unit in Unit.of(model.module):
        if unit.role != "table" or unit.part_of is not None:
            continue
        module = getattr(unit.module, "table", unit.module)
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            found[unit.name] = module.weight.detach().double()
        else:
            with torch.no_grad():
                found[unit.name] = module(torch.arange(unit.rows)).double()
    return found


def table_bytes(model: Model) -> int:
    """Bytes of all tables, parts and whatever belongs to them."""
    return sum(unit.bytes for unit in Unit.of(model.module) if unit.role == "table")


def error(before: dict[str, Tensor], after: dict[str, Tensor], weight: dict[str, Tensor]) -> float:
    """Weighted squared error of all rows, as a share of their squares about each table's mean."""
    lost = whole = 0.0
    for name, rows in before.items():
        share = (weight[name] / weight[name].sum()).unsqueeze(1)
        lost += float((share * (after[name] - rows).square()).sum())
        whole += float((share * (rows - (share * rows).sum(dim=0)).square()).sum())
    return lost / whole


def line(model: Model, source: Model, bench: Bench, counts: dict[str, Tensor], auc: float) -> str:
    """What one result costs and loses, as the end of a Markdown line."""
    before, after = rows_of(source), rows_of(model)
    alike = {name: torch.ones(len(rows), dtype=torch.float64) for name, rows in before.items()}
    parts = (
        f"{table_bytes(model) / table_bytes(source):.1%}",
        f"{error(before, after, alike):.2%}",
        f"{error(before, after, counts):.2%}",
        f"{auc_of(model.module, bench) - auc:+.5f}",
    )
    return " | ".join(parts)


def main() -> None:
    """Print one line a form and packing, as Markdown tables."""
    torch.set_num_threads(1)
    subject = find(sys.argv[1] if len(sys.argv) > 1 else BUNDLE)
    loaded = load_bundle(subject.artifact)
    rows = subject.rows
    parts = {part: prepare.fn(subject.artifact, part, "benchmark") for part in PARTS}
    held = {part: split_of(made, rows[part]) for part, made in parts.items()}
    soft = score.fn(subject.artifact, parts["train"], rows["train"], "benchmark")
    held["soft_labels"] = split_of(soft, rows["train"])
    bench = bench_of(loaded.manifest, held, subject.artifact, 0)
    source = loaded.model
    units = [unit for unit in Unit.of(source.module) if unit.role == "table"]
    dim = units[0].weight.shape[1]
    counts = {k: v + 1e-9 for k, v in lookup_counts(source, bench, [u.name for u in units]).items()}
    auc = auc_of(source.module, bench)
    distill = Distill(training=Training(tables=True, table_l2=TABLE_L2))
    print(f"AUC on validation rows as trained: {auc:.5f}; {table_bytes(source)} bytes of tables")
    print("| form | parts | bytes | error | by lookups | change of AUC |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for number, packer in enumerate(PACKERS[1:]):
            assert packer is not None
            packed = run(packer, source, bench, Path(scratch) / f"plain-{number}")
            print(f"| none | `{packer.kind}` | {line(packed, source, bench, counts, auc)} |")
        taught = run(distill, source, bench, Path(scratch) / "taught")
        print(f"| none | float32, distilled | {line(taught, source, bench, counts, auc)} |")
        for group, steps in groups(dim).items():
            for number, step in enumerate(steps):
                folder = Path(scratch) / f"{group.replace('/', '-')}-{number}"
                made = run(step, source, bench, folder)
                taught = run(distill, made, bench, folder / "taught")
                for first, packers in ((made, PACKERS), (taught, PACKERS[::2])):
                    for packer in packers:
                        kind = f"`{packer.kind}`" if packer else "float32"
                        if first is taught:
                            kind += ", distilled"
                        model = first
                        if packer is not None:
                            model = run(packer, first, bench, folder / kind.strip("`"))
                        result = line(model, source, bench, counts, auc)
                        print(f"| {told(step)} {group} | {kind} | {result} |", flush=True)


if __name__ == "__main__":
    main()
