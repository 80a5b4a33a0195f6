"""How much AUC is lost by fewer table rows, or rows in two formats, at about equal bytes?

In tables with at least 64 rows of the demo's model (``recpress demo``: DCN-v2 on MovieLens 100K),
rows are pruned, clustered, merged, or split into frequent ("hot") and rare ("cold") rows with
different formats (``tiers``). ``drop_tables`` removes whole tables. Prints the bytes of all tables
as a share of float32, the change of AUC on validation rows, and the share of training lookups whose
row changes. Bytes and change of AUC are printed twice: before the remaining rows are quantized (not
for recipes that only quantize, and for ``tiers``), and after. ``drop_tables`` selects tables by the
same validation rows, so its AUC is optimistic.

Labels: the number after ``prune_rows`` is the share of kept rows. They are selected by their
training lookups ("lookups"), their length ("norm"), or the estimated change of the loss without the
row ("gradient"). A pruned row is replaced by the nearest kept row ("nearest"), the mean of the
pruned rows ("shared") or zeros. The number after "hot" is the share of hot rows, which
``cluster_rows`` does not cluster. "clusters" is the number of clusters as a share of the rows that
are not hot. "within" is the largest distance of merged rows, as a multiple of the root mean square
length of the table's rows. "at no loss" drops as many tables as possible without a decrease of AUC
on validation rows. "none": no rows are removed.

    recpress demo && python -m benchmarks.table_rows
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.distill_settings import evaluate_auc
from benchmarks.table_forms import table_bytes
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.steps.step import Step, TableStep
from compressors.prune.tables.cluster_rows import ClusterRows
from compressors.prune.tables.drop_tables import DropTables
from compressors.prune.tables.merge_rows import MergeRows
from compressors.prune.tables.prune_rows import PruneRows
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.cli.demo import BUNDLE
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.loading import build_bench, fetch_split, load_bundle
from tasks.prepare import prepare

MIN_ROWS = 64  # smaller tables keep all rows
LOOKUP_REASONS = ("pruned_lookups", "shared_lookups")
"""Codes of reasons whose field ``share`` is a share of lookups."""
Steps = tuple[Step | TableStep, ...]


def build_recipes() -> dict[str, Steps]:
    """Return the compared recipes, by the label of their line."""
    steps_by_label: dict[str, Steps] = {"none": (RowwiseInt8(),)}
    for keep in (0.5, 0.25):
        for importance in ("lookups", "gradient", "norm"):
            step = PruneRows(min_rows=MIN_ROWS, keep=keep, importance=importance, pruned="shared")
            steps_by_label[f"`prune_rows` {keep:g} by {importance}, shared"] = (step, RowwiseInt8())
        for pruned in ("zero", "nearest"):
            step = PruneRows(min_rows=MIN_ROWS, keep=keep, pruned=pruned)
            steps_by_label[f"`prune_rows` {keep:g} by lookups, {pruned}"] = (step, RowwiseInt8())
    for hot, clusters in ((0.4, 0.1), (0.2, 0.05), (0.0, 0.1)):
        cluster = ClusterRows(min_rows=MIN_ROWS, hot=hot, clusters=clusters)
        steps_by_label[f"`cluster_rows` hot {hot:g}, clusters {clusters:g}"] = (
            cluster,
            RowwiseInt8(),
        )
    for within in (0.3, 0.6):
        merge = MergeRows(min_rows=MIN_ROWS, within=within)
        steps_by_label[f"`merge_rows` within {within:g}"] = (merge, RowwiseInt8())
    steps_by_label["`drop_tables` at no loss"] = (DropTables(), RowwiseInt8())
    for hot in (0.1, 0.3):
        cold = RowwiseInt2(tables=("*.cold",))
        tiers = (Tiers(min_rows=MIN_ROWS, hot=hot), cold, RowwiseInt8())
        steps_by_label[f"`tiers` hot {hot:g} in int8, cold in int2"] = tiers
    steps_by_label["`rowwise_int4`"] = (RowwiseInt4(),)
    steps_by_label["`rowwise_int2`"] = (RowwiseInt2(),)
    return steps_by_label


def format_affected_lookups(model: Model) -> str:
    """Format the smallest and largest share of affected lookups of a table, from the plan."""
    lines = model.plan.lines if model.plan else ()
    shares = [
        100 * float(reason.fields["share"])
        for line in lines
        for reason in line.reasons
        if reason.code in LOOKUP_REASONS
    ]
    return f"{min(shares):.1f} to {max(shares):.1f} %" if shares else ""


def main() -> None:
    """Print a Markdown table with one line per recipe."""
    torch.set_num_threads(1)
    bundle_ref = find_bundle(BUNDLE)
    loaded = load_bundle(bundle_ref.artifact)
    splits = {
        part: fetch_split(prepare.fn(bundle_ref.artifact, part), bundle_ref.rows[part])
        for part in ("train", "validation")
    }
    bench = build_bench(loaded.manifest, splits, bundle_ref.artifact, seed=0)
    source = loaded.model
    auc = evaluate_auc(source.module, bench)
    print(f"AUC on validation rows as trained: {auc:.5f}; {table_bytes(source)} bytes of tables")
    print("| recipe | bytes, float32 | change of AUC | affected lookups | ", end="")
    print("bytes, quantized | change of AUC |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (label, steps) in enumerate(build_recipes().items()):
            model, cells = source, ["", "", ""]
            for index, step in enumerate(steps):
                model = run(step, model, bench, Path(scratch) / f"{number}-{index}")
                if index == 0 and len(steps) == 2:  # the second step quantizes the remaining rows
                    size = f"{table_bytes(model) / table_bytes(source):.1%}"
                    change = f"{evaluate_auc(model.module, bench) - auc:+.5f}"
                    cells = [size, change, format_affected_lookups(model)]
            bytes_share = f"{table_bytes(model) / table_bytes(source):.1%}"
            cells += [bytes_share, f"{evaluate_auc(model.module, bench) - auc:+.5f}"]
            print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
