"""What do the presets change in the reference models?

Trains each model of ``examples/`` with several seeds, packs its draft (the folder that becomes a
bundle), compresses it with presets and with a recipe of its own, and prints the
bytes served, the change of its quality metrics on test rows, and the ratio of median latencies, all
against the uncompressed model in ONNX Runtime with one thread. Changes are means over the seeds ±
half the width of their 95 % interval (Student's t); other values are means.

    python -m benchmarks.reference_models din --seeds 5 [--presets fast small] [--data FOLDER]

Drafts, stores and registries stay in ``--cache``; finished runs in it are not repeated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from urllib.parse import unquote

from benchmarks.ctr import compute_interval_half_width
from examples.public_data import DATA_VARIABLE
from infra.settings import load_settings

BATCHES = (1, 64, 1024)
"""Rows per call for which latency is measured."""


@dataclass(frozen=True)
class ReferenceModel:
    """A model of ``examples/``.

    Attributes:
        script: module and arguments of its training script, without the folder.
        bundle: name of the bundle that the script writes.
        metrics: quality metrics to print; the first one is used in the limit.
        recipe: the steps of the preset ``recipe``, selected on validation rows.
    """

    script: tuple[str, ...]
    bundle: str
    metrics: tuple[str, ...]
    recipe: tuple[Mapping[str, object], ...] = ()


RECIPE = "recipe"
"""Name of a model's own recipe among the presets."""


def build_recipe(student: Mapping[str, object]) -> tuple[Mapping[str, object], ...]:
    """Return the recipe of a model of MovieLens: a smaller student, 4-bit tables, int8 layers."""
    training = {
        "epochs": 20,
        "learning_rate": 0.003,
        "schedule": "cosine",
        "patience": 20,
        "warmup": 0,
        "tables": True,
    }
    return (
        {"kind": "distill", "soft_share": 0.7, "student": student, "training": training},
        {"kind": "rowwise_int4", "clipping": "least_squares"},
        {"kind": "static_int8"},
    )


TOWER_TRAINING = {"tables": True, "schedule": "cosine", "patience": 6, "negatives": 2048}
"""Settings of the training of towers in the recipe of Gowalla."""

MODELS: Mapping[str, ReferenceModel] = {
    "deepfm": ReferenceModel(
        ("examples.frappe", "--model", "deepfm"), "frappe-deepfm", ("auc", "logloss")
    ),
    "dlrm": ReferenceModel(
        ("examples.frappe", "--model", "dlrm"),
        "frappe-dlrm",
        ("auc", "logloss"),
        recipe=(
            {
                "kind": "distill",
                "soft_share": 0.7,
                "student": {"top": [200, 200, 200], "dropout": 0.3},
                "training": {
                    "epochs": 40,
                    "batch": 4096,
                    "learning_rate": 0.001,
                    "patience": 3,
                    "warmup": 0,
                    "tables": True,
                    "table_l2": 0.05,
                },
            },
            {"kind": "rowwise_int4", "clipping": "least_squares"},
            {"kind": "fold"},
            {"kind": "static_int8"},
        ),
    ),
    "xdeepfm": ReferenceModel(
        ("examples.frappe", "--model", "xdeepfm"), "frappe-xdeepfm", ("auc", "logloss")
    ),
    "dlrm-bags": ReferenceModel(("benchmarks.dlrm_bags",), "random-dlrm-bags", ("auc",)),
    "mq2008": ReferenceModel(("examples.mq2008",), "mq2008-perceptron", ("ndcg@10",)),
    "din": ReferenceModel(
        ("examples.movielens_histories", "--model", "din"),
        "ml100k-din",
        ("auc", "logloss"),
        recipe=build_recipe({"dim": 8, "hidden": [32, 16], "attention": [32, 16]}),
    ),
    "sasrec": ReferenceModel(
        ("examples.movielens_histories", "--model", "sasrec"),
        "ml100k-sasrec",
        ("ndcg@10", "recall@20"),
    ),
    "gowalla": ReferenceModel(
        ("examples.gowalla",),
        "gowalla-two-tower",
        ("recall@20", "ndcg@20"),
        recipe=(
            {
                "kind": "distill",
                "soft_share": 0.5,
                "student": {"dim": 30},
                "training": {**TOWER_TRAINING, "epochs": 6, "learning_rate": 0.003},
            },
            {
                "kind": "fine_tune",
                "training": {**TOWER_TRAINING, "epochs": 2, "learning_rate": 0.001},
            },
            {
                "kind": "table_qat",
                "bits": 4,
                "rows_per_scale": 4,
                "soft_share": 0.5,
                "training": {
                    "epochs": 4,
                    "learning_rate": 0.002,
                    "schedule": "cosine",
                    "negatives": 2048,
                },
            },
            {"kind": "static_int8"},
        ),
    ),
    "mmoe": ReferenceModel(
        ("examples.movielens_tasks",),
        "ml100k-mmoe",
        ("auc[click]", "auc[like]"),
        recipe=build_recipe({"dim": 8, "expert": 64, "tower": 32}),
    ),
}


@dataclass(frozen=True)
class Result:
    """What one run of ``recpress compress`` measured.

    Attributes:
        baseline: values of the uncompressed model, by metric.
        compressed: values of the compressed model, by metric.
        changes: changes of the quality metrics, and ratios of bytes and latencies, by metric.
    """

    baseline: Mapping[str, float]
    compressed: Mapping[str, float]
    changes: Mapping[str, float]


def run_recpress(home: Path, *arguments: str) -> str:
    """Run a command of recpress and return its output."""
    environment = {
        **os.environ,
        "RECPRESS_HOME": str(home),
        "RECPRESS_ALLOWED_MODULES": "examples",
        "COLUMNS": "400",  # lines are not wrapped
    }
    command = [sys.executable, "-m", "flows.cli.app", *arguments]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def train_and_pack(model: ReferenceModel, seed: int, folder: Path) -> None:
    """Train the network with a seed and pack it, unless ``folder`` has it already."""
    if (folder / "packed").exists():
        return
    module, *arguments = model.script
    command = [sys.executable, "-m", module, str(folder / "draft"), "--seed", str(seed)]
    subprocess.run([*command, *arguments], check=True)
    run_recpress(folder / "home", "bundle", "pack", str(folder / "draft"))
    (folder / "packed").touch()


def build_order(model: ReferenceModel, preset: str) -> dict[str, object]:
    """Return an order; its limits are so loose that every result is accepted."""
    return {
        "model": model.bundle,
        "targets": {"onnxruntime": "required"},
        "limits": [
            {"metric": model.metrics[0], "against": "baseline", "at_least": -0.4},
            {"metric": "bytes", "against": "baseline", "at_most": 1},
        ],
        **(
            {"preset": "custom", "steps": list(model.recipe)}
            if preset == RECIPE
            else {"preset": preset}
        ),
    }


def compress(model: ReferenceModel, preset: str, folder: Path) -> Result:
    """Compress a packed model and read the report; a stored report is not measured again."""
    path = folder / f"{preset}.json"
    if not path.exists():
        order = folder / f"{preset}.order.json"
        order.write_text(json.dumps(build_order(model, preset), indent=2))
        output = run_recpress(folder / "home", "compress", "--order", str(order))
        found = re.search(r"file://(\S+)/report\.html", output)
        if found is None:
            sys.exit(f"Expected the address of a report, got:\n{output}")
        path.write_text((Path(unquote(found[1])) / "report.json").read_text())
    # ``numbers``: the compressed model; ``baseline``: the uncompressed one. Both have ``numbers``.
    measurement = json.loads(path.read_text())["measurement"]

    # ``against``: "absolute" for values, "baseline" for changes from the uncompressed model.
    def values(entry: Mapping[str, list[dict[str, object]]], against: str) -> dict[str, float]:
        return {
            str(number["metric"]): float(number["estimate"]["point"])  # type: ignore[index]
            for number in entry["numbers"]
            if number["against"] == against
        }

    return Result(
        values(measurement["baseline"], "absolute"),
        values(measurement["numbers"], "absolute"),
        values(measurement["numbers"], "baseline"),
    )


def format_row(model: ReferenceModel, preset: str, results: list[Result]) -> str:
    """Return a line of the printed table."""
    served = mean(result.compressed["bytes"] for result in results)
    share = mean(result.changes["bytes"] for result in results)
    cells = [f"`{preset}`", f"{served:,.0f} ({share:.2f}x)"]
    for metric in model.metrics:
        changes = [result.changes[metric] for result in results]
        cells.append(f"{mean(changes):+.5f} ± {compute_interval_half_width(changes):.5f}")
    latencies = []
    for batch in BATCHES:
        # No latency is measured for more rows than the test data has.
        ratios = [x.changes[name] for x in results if (name := f"p50_ms@{batch}") in x.changes]
        latencies.append(f"{mean(ratios):.2f}x" if ratios else "-")
    cells.append(" / ".join(latencies))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train, compress, and print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--seeds", type=int, default=5, help="number of networks per model")
    parser.add_argument("--presets", nargs="+", default=["fast", "small", RECIPE])
    parser.add_argument("--data", type=Path, help=f"folder of the data sets (or {DATA_VARIABLE})")
    parser.add_argument("--cache", type=Path, help="folder of the runs")
    args = parser.parse_args()
    cache = args.cache or load_settings().home / "benchmarks" / "reference_models"
    if args.data is not None:
        os.environ[DATA_VARIABLE] = str(args.data)
    for name in args.models:
        model = MODELS[name]
        presets = [preset for preset in args.presets if preset != RECIPE or model.recipe]
        results: dict[str, list[Result]] = {preset: [] for preset in presets}
        for seed in range(1, args.seeds + 1):
            folder = cache / name / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            train_and_pack(model, seed, folder)
            for preset in presets:
                results[preset].append(compress(model, preset, folder))
                print(name, seed, format_row(model, preset, results[preset][-1:]), file=sys.stderr)
        baseline = [result.baseline for result in results[presets[0]]]
        print(f"\n{name}, {args.seeds} networks; uncompressed:", end=" ")
        for metric in ("bytes", *model.metrics, *(f"p50_ms@{batch}" for batch in BATCHES)):
            if metric in baseline[0]:
                print(f"{metric} {mean(values[metric] for values in baseline):,.5g}", end="  ")
        changes = " | ".join(f"change of {metric}" for metric in model.metrics)
        print(f"\n\n| preset | bytes served | {changes} | p50 at batch 1 / 64 / 1024 |")
        print("|---" * (3 + len(model.metrics)) + "|")
        for preset, measured in results.items():
            print(format_row(model, preset, measured), flush=True)


if __name__ == "__main__":
    main()
