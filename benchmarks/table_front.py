"""Which table methods lose the least AUC at each size of a click model's tables (Pareto front)?

Each recipe runs on the tuned networks of ``benchmarks/ctr.py`` with several seeds. The loss is the
network's AUC minus the AUC of the compressed network, as mean over seeds ± half the width of its
95 % interval (Student's t). Bytes are the stored bytes of all tables, including codes, scales,
codebooks, row maps (from ids to stored rows) and projections, as a share of float32. Dense layers
stay in float32. The recipes were selected by the validation rows of seed 0.

    python -m benchmarks.table_front --seeds 5 --picture docs/pictures/table_front.png
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from pydantic import TypeAdapter

from benchmarks.ctr import (
    Name,
    auc,
    compute_interval_half_width,
    create_parser,
    data_folder,
    default_cache,
    load_baseline,
    prepare_splits,
)
from compressors.contracts import Bench, Split, digest
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.core.units import Unit
from examples.public_data import DataMissing

GOAL = 0.0005
"""Largest mean loss of AUC that the goals of this comparison allow; a dotted line in the plot."""

RECIPE_ADAPTER = TypeAdapter(tuple[AnyStep, ...])
Recipes = list[tuple[str, str, list[dict[str, Any]]]]
"""Family of the method, description of its settings, and steps."""

# The recipes with which additive codes are compared.
PEERS: Recipes = [
    ("row-wise", "int8", [{"kind": "rowwise_int8"}]),
    ("row-wise", "int4, clipped", [{"kind": "rowwise_int4", "clipping": "mse"}]),
    (
        "row-wise",
        "int2 with offsets, clipped",
        [{"kind": "rowwise_int2", "symmetric": False, "clipping": "mse"}],
    ),
    *(("SVD", f"rank {rank} of 10", [{"kind": "low_rank", "rank": rank}]) for rank in (6, 4, 2)),
    *(
        (
            "quotient, remainder",
            f"table of remainders with {fraction} of the rows",
            [{"kind": "quotient_remainder", "buckets": share, "weighted": True}],
        )
        for share, fraction in ((0.5, "1/2"), (0.1, "1/10"))
    ),
    *(
        (
            "product codes",
            f"{parts} of {bits} bits",
            [{"kind": "product_codes", "parts": parts, "bits": bits}],
        )
        for parts, bits in ((5, 8), (5, 4), (2, 4))
    ),
]


def _additive_codes(
    codebooks: int, tables: tuple[str, ...] = ("*",), **settings: Any
) -> dict[str, Any]:
    """Return the step ``additive_codes``, which stores a row as a sum of codebook entries.

    Args:
        codebooks: number of codes per row, one of each codebook; a code has 4 bits unless
            ``settings`` has ``bits``.
        tables: patterns of the names of tables.
        **settings: other settings of the step. ``rounds``: rounds of the fit; ``beam``: width of
            its beam search; ``draws``: number of fits; ``lookup_power=1``: rows are weighted by
            their lookup counts; ``sensitive=False``: not weighted by loss gradients.
    """
    return {"kind": "additive_codes", "codebooks": codebooks, "tables": tables, **settings}


TINY_FIELDS = ("daytime", "weekday", "isweekend", "homework", "cost", "weather")
"""Frappe's fields whose tables have 2 to 9 rows."""
KMEANS_FOR_TINY_TABLES = {
    "kind": "kmeans",
    "bits": 2,
    "scale": "none",
    "tables": tuple(f"tables.{name}" for name in TINY_FIELDS),
}


def _frappe_steps(item: int, user: dict[str, Any], location: int) -> list[dict[str, Any]]:
    """Return steps for Frappe: additive codes for large tables, 2 bits per weight for tiny ones.

    Args:
        item: number of codes of a row of the table ``item``.
        user: the step for the table ``user``.
        location: number of codes of a row of the tables ``country`` and ``city``.
    """
    return [
        KMEANS_FOR_TINY_TABLES,
        _additive_codes(item, ("tables.item",)),
        user,
        _additive_codes(location, ("tables.country", "tables.city")),
    ]


def _user_codes(codebooks: int, bits: int) -> dict[str, Any]:
    """Return the step for the table ``user``, with ``codebooks`` codes of ``bits`` bits per row."""
    return _additive_codes(codebooks, ("tables.user",), bits=bits)


# Both are the recipe "24 bits per item, 32 per user" with other settings of the fit: more rounds
# for the largest tables, and the best of several fits.
MORE_ROUNDS = [
    KMEANS_FOR_TINY_TABLES,
    _additive_codes(6, ("tables.item",), rounds=80, beam=16),
    _additive_codes(16, ("tables.user",), bits=2, rounds=40),
    _additive_codes(2, ("tables.country", "tables.city"), rounds=10),
]

BEST_OF_DRAWS = [
    {**step, "draws": 4} if step["kind"] == "additive_codes" else step for step in MORE_ROUNDS
]


# Arguments of ``_frappe_steps``: codes per item, step for users, codes per country and city.
ADDITIVE_CODES: dict[Name, Recipes] = {
    "frappe": [
        ("additive codes", "32 bits per item, 24 per user", _frappe_steps(8, _user_codes(6, 4), 2)),
        (
            "additive codes",
            "24 bits per item, 32 per user",
            _frappe_steps(6, _user_codes(16, 2), 2),
        ),
        ("additive codes", "the same, fitted in 80 rounds", MORE_ROUNDS),
        ("additive codes", "the same, best of 4 fits on validation rows", BEST_OF_DRAWS),
        ("additive codes", "16 bits per item, 16 per user", _frappe_steps(4, _user_codes(4, 4), 2)),
        ("additive codes", "8 bits per item, 8 per user", _frappe_steps(2, _user_codes(2, 4), 1)),
    ],
    "movielens-tag": [
        (
            "additive codes",
            "1 code of 8 bits per row",
            [_additive_codes(1, bits=8, lookup_power=1, sensitive=False)],
        ),
        (
            "additive codes",
            "2 codes of 4 bits per row",
            [_additive_codes(2, lookup_power=1, sensitive=False)],
        ),
    ],
}
# Additive codes are black; the other families have colours of matplotlib's default cycle.
COLOURS = {"additive codes": "black"}
MARKERS = {"additive codes": "o", "row-wise": "s", "SVD": "^", "product codes": "D"}


def table_bytes(model: Model) -> int:
    """Return the stored bytes of all tables."""
    return sum(unit.bytes for unit in Unit.of(model.module) if unit.role == "table")


def measure(steps: list[dict[str, Any]], model: Model, bench: Bench, test: Split) -> list[float]:
    """Return the share of bytes of tables, and the losses of AUC on validation and test rows."""
    assert bench.validation is not None
    compressed = model
    with tempfile.TemporaryDirectory() as scratch:
        for number, step in enumerate(RECIPE_ADAPTER.validate_python(steps)):
            compressed = run(step, compressed, bench, Path(scratch) / str(number))
        losses = [
            auc(model.module, split) - auc(compressed.module, split)
            for split in (bench.validation, test)
        ]
        return [table_bytes(compressed) / table_bytes(model), *losses]


def draw(results: dict[Name, list[tuple[str, list[list[float]]]]], path: Path) -> None:
    """Plot loss against bytes: one panel per data set, one line per family.

    Args:
        results: by data set, the family of each recipe and the results of ``measure`` by seed.
        path: file of the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(5.5 * len(results), 4.2), squeeze=False
    )
    for panel, (name, lines) in zip(panels[0], results.items(), strict=True):
        for family in dict.fromkeys(family for family, _ in lines):
            points = sorted(
                (mean(v[0] for v in values), [v[2] for v in values])
                for line_family, values in lines
                if line_family == family
            )
            panel.errorbar(
                [100 * share for share, _ in points],
                [mean(losses) for _, losses in points],
                yerr=[compute_interval_half_width(losses) for _, losses in points],
                label=family,
                marker=MARKERS.get(family, "v"),
                color=COLOURS.get(family),
                capsize=2,
            )
        panel.axhline(GOAL, color="black", linewidth=0.7, linestyle=":")
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=GOAL)
        ticks = (1, 2, 5, 10, 20, 50, 100)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_title(name)
        panel.set_xlabel("bytes of tables, % of float32")
        panel.set_ylabel("loss of AUC on test rows")
        panel.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print one Markdown table per data set; with ``--picture``, also plot them."""
    parser = create_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path, help="file for a plot of the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = args.cache or default_cache()
    try:
        folder = data_folder(args.data)
    except DataMissing as error:
        sys.exit(str(error))
    results: dict[Name, list[tuple[str, list[list[float]]]]] = {}
    for name in [args.only] if args.only else get_args(Name):
        splits, _ = prepare_splits(name, folder, cache)
        print(f"\n{name}, {args.seeds} seeds\n")
        print("| method | stored as | bytes of tables | loss of AUC, test rows | validation rows |")
        print("|---|---|---|---|---|")
        results[name] = []
        for family, description, steps in (*PEERS, *ADDITIVE_CODES[name]):
            values = []
            for seed in range(args.seeds):
                # Results are stored per seed, so that an interrupted run can be continued.
                cached = cache / name / f"seed{seed}" / f"front-{digest(steps)[:16]}.json"
                if not cached.is_file():
                    model, bench = load_baseline(name, seed, folder, cache)
                    cached.write_text(json.dumps(measure(steps, model, bench, splits["test"])))
                values.append(json.loads(cached.read_text()))
            share = mean(value[0] for value in values)
            cells = [f"{share:.1%} ({1 / share:.0f}x)"]
            for column in (2, 1):
                losses = [value[column] for value in values]
                cells.append(f"{mean(losses):.5f} ± {compute_interval_half_width(losses):.5f}")
            print(f"| {family} | {description} | {' | '.join(cells)} |", flush=True)
            results[name].append((family, values))
    if args.picture is not None:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
