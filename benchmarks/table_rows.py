"""What do fewer rows, and rows in two tiers, cost byte for byte?

On the demo's tables of 64 rows and more: pruned, clustered, merged, parted into tiers, dropped.
Bytes of all tables against float32, the share of the training lookups that are touched, and the
change of AUC on the validation rows (where ``drop_tables`` also chooses), alone and with what is
left in 8 bits.

    recpress demo && python -m benchmarks.table_rows
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.distill_settings import auc_of
from benchmarks.table_forms import table_bytes
from compressors.core.model import Model
from compressors.core.runner import ModelStep, TableStep, run
from compressors.prune.tables.cluster_rows import ClusterRows
from compressors.prune.tables.drop_tables import DropTables
from compressors.prune.tables.merge_rows import MergeRows
from compressors.prune.tables.prune_rows import PruneRows
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.cli.demo import BUNDLE
from tasks.bundles.bundle_ref import find
from tasks.bundles.loading import bench_of, load_bundle, split_of
from tasks.prepare import prepare

LEAST = 64  # rows of a table that loses some
LOOKUPS = ("pruned_lookups", "shared_lookups")  # codes of reasons with a share of lookups
Steps = tuple[ModelStep | TableStep, ...]


def recipes() -> dict[str, Steps]:
    """What is compared, by how it is told."""
    found: dict[str, Steps] = {"none": (RowwiseInt8(),)}
    for keep in (0.5, 0.25):
        for importance in ("traffic", "gradient", "norm"):
            step = PruneRows(min_rows=LEAST, keep=keep, importance=importance)
            found[f"`prune_rows` {keep:g} by {importance}, shared"] = (step, RowwiseInt8())
        for pruned in ("zero", "nearest"):
            step = PruneRows(min_rows=LEAST, keep=keep, pruned=pruned)
            found[f"`prune_rows` {keep:g} by traffic, {pruned}"] = (step, RowwiseInt8())
    for hot, clusters in ((0.4, 0.1), (0.2, 0.05), (0.0, 0.1)):
        clustered = ClusterRows(min_rows=LEAST, hot=hot, clusters=clusters)
        found[f"`cluster_rows` hot {hot:g}, clusters {clusters:g}"] = (clustered, RowwiseInt8())
    for within in (0.3, 0.6):
        merged = MergeRows(min_rows=LEAST, within=within)
        found[f"`merge_rows` within {within:g}"] = (merged, RowwiseInt8())
    found["`drop_tables` at no loss"] = (DropTables(), RowwiseInt8())
    for hot in (0.1, 0.3):
        cold = RowwiseInt2(tables=("*.cold",))
        parted = (Tiers(min_rows=LEAST, hot=hot), cold, RowwiseInt8())
        found[f"`tiers` hot {hot:g} in int8, cold in int2"] = parted
    found["`rowwise_int4`"] = (RowwiseInt4(),)
    found["`rowwise_int2`"] = (RowwiseInt2(),)
    return found


def touched(model: Model) -> str:
    """What the plan says of lookups and rows, table by table, as one range."""
    lines = model.plan.lines if model.plan else ()
    shares = [
        100 * float(reason.fields["share"])
        for line in lines
        for reason in line.reasons
        if reason.code in LOOKUPS
    ]
    return f"{min(shares):.1f} to {max(shares):.1f} %" if shares else ""


def main() -> None:
    """Print one line a recipe, as a Markdown table."""
    torch.set_num_threads(1)
    subject = find(BUNDLE)
    loaded = load_bundle(subject.artifact)
    held = {
        part: split_of(prepare.fn(subject.artifact, part, "benchmark"), subject.rows[part])
        for part in ("train", "validation")
    }
    bench = bench_of(loaded.manifest, held, subject.artifact, 0)
    source = loaded.model
    auc = auc_of(source.module, bench)
    print(f"AUC on validation rows as trained: {auc:.5f}; {table_bytes(source)} bytes of tables")
    print("| rows | bytes, float32 | change of AUC | lookups touched | packed | change of AUC |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (told, steps) in enumerate(recipes().items()):
            model, cells = source, ["", "", ""]
            for place, step in enumerate(steps):
                model = run(step, model, bench, Path(scratch) / f"{number}-{place}")
                if place == 0 and len(steps) == 2:
                    size = f"{table_bytes(model) / table_bytes(source):.1%}"
                    change = f"{auc_of(model.module, bench) - auc:+.5f}"
                    cells = [size, change, touched(model)]
            packed = f"{table_bytes(model) / table_bytes(source):.1%}"
            cells += [packed, f"{auc_of(model.module, bench) - auc:+.5f}"]
            print(f"| {told} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
