"""Is a student with half the dense FLOPs better for having had a teacher?

Frappe's DCN-v2 (``benchmarks/ctr.py``): the original has 400-400-400 beside its cross layers, the
student 256-256-256, 48 % of the multiplications. Three ways to the same student, each with the
original's own recipe (Adam, its rate cut by ten, dropout, batch norm, penalty on whole tables,
batch, patience):

- scratch: as the original was trained, from drawn weights and the labels.
- pointwise, listwise, ...: ``distill`` with that loss, tables taken over from the original and
  trained on, labels and soft labels. Without a group column the batch is the list.

Dropout is chosen for each way, and the share of soft labels, on validation rows of the first
network (``--tune``), best epochs as well; test rows are read for the table alone. A seed draws the
original, the student and the order of rows.

    python -m benchmarks.students --tune
    python -m benchmarks.students --seeds 5
"""

import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
from torch import nn

from benchmarks.ctr import (
    RECIPES,
    DataMissing,
    architecture,
    arguments,
    auc,
    baseline,
    data_folder,
    default_cache,
    interval,
    prepared,
    train,
)
from compressors.distill.distill import Distill
from compressors.distill.losses import SoftLoss
from compressors.step import run
from compressors.training import Training

HIDDEN = [256, 256, 256]
SCRATCH = "scratch"
RECIPE = RECIPES["frappe"]
DROPOUTS = (0.3, 0.5)
SHARES = (0.5, 0.7)


def dense_products(module: nn.Module) -> int:
    """Multiplications of all dense layers for one row."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


@dataclass(frozen=True)
class Way:
    """How a student is made; ``scratch`` has no soft labels."""

    name: str
    dropout: float
    share: float = 0.0


TRIED = (
    *(Way(SCRATCH, dropout) for dropout in DROPOUTS),
    *(
        Way(loss, dropout, share)
        for loss in ("pointwise", "listwise")
        for dropout in DROPOUTS
        for share in SHARES
    ),
)
WAYS = (Way(SCRATCH, 0.5), Way("pointwise", 0.3, 0.7), Way("listwise", 0.3, 0.7))


def distilled(way: Way, epochs: int) -> Distill:
    """The step that makes the student."""
    return Distill(
        student={"hidden": HIDDEN, "dropout": way.dropout},
        loss=cast("SoftLoss", way.name),
        soft_share=way.share,
        training=Training(
            epochs=epochs,
            batch=RECIPE.batch,
            learning_rate=RECIPE.learning_rate,
            patience=RECIPE.patience,
            warmup=0,
            tables=True,
            table_l2=RECIPE.table_l2,
        ),
    )


def found(way: Way, seed: int, folder: Path, cache: Path, epochs: int) -> Any:
    """AUC on validation and test rows of one student, trained unless ``cache`` knows it."""
    name = f"{way.name}-{way.dropout:g}-{way.share:g}-{epochs}-{seed}.json"
    place = cache / "students" / name
    if place.is_file():
        return json.loads(place.read_text())
    begun = time.perf_counter()
    model, bench = baseline("frappe", seed, folder, cache)
    splits, rows = prepared("frappe", folder, cache)
    if way.name == SCRATCH:
        built = architecture(rows, RECIPE)
        config = {**built.config, "hidden": HIDDEN, "dropout": way.dropout}
        built = built.model_copy(update={"config": config})
        recipe = replace(RECIPE, epochs=epochs)
        module, _ = train(built, recipe, splits["train"], splits["validation"], seed)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            module = run(distilled(way, epochs), model, bench, Path(scratch)).module
    told = {part: auc(module, splits[part]) for part in ("validation", "test")}
    told["products"] = dense_products(module)
    told["seconds"] = time.perf_counter() - begun
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(told))
    print(way, seed, json.dumps(told), file=sys.stderr, flush=True)
    return told


def tune(folder: Path, cache: Path, epochs: int) -> None:
    """Print the validation AUC of all that is tried on the first network."""
    print("| student | dropout | soft share | validation AUC |")
    print("|---|---|---|---|")
    for way in TRIED:
        value = found(way, 0, folder, cache, epochs)["validation"]
        print(f"| {way.name} | {way.dropout} | {way.share or ''} | {value:.5f} |", flush=True)


def main() -> None:
    """Print a line for each way, with the difference to the student from scratch, seed by seed."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs, help="fewer to try it out")
    parser.add_argument("--tune", action="store_true", help="what was tried on validation rows")
    asked = parser.parse_args()
    logging.getLogger("compressors").setLevel(logging.WARNING)
    torch.set_num_threads(asked.threads)
    cache = asked.cache or default_cache()
    try:
        folder = data_folder(asked.data)
    except DataMissing as fault:
        sys.exit(str(fault))
    if asked.tune:
        tune(folder, cache, asked.epochs)
        return
    base: list[float] = []
    held: dict[Way, list[Any]] = {way: [] for way in WAYS}
    for seed in range(asked.seeds):
        model, _ = baseline("frappe", seed, folder, cache)
        base.append(auc(model.module, prepared("frappe", folder, cache)[0]["test"]))
        whole = dense_products(model.module)
        for way in WAYS:
            held[way].append(found(way, seed, folder, cache, asked.epochs))
    print("| student | dropout | soft share | products | validation AUC | test AUC | to scratch |")
    print("|---|---|---|---|---|---|---|")
    print(f"| the original | | | {whole:,} | | {mean(base):.5f} ± {interval(base):.5f} | |")
    first = [item["test"] for item in held[WAYS[0]]]
    for way, results in held.items():
        test = [item["test"] for item in results]
        gaps = [own - other for own, other in zip(test, first, strict=True)]
        validation = mean(item["validation"] for item in results)
        gap = "" if way.name == SCRATCH else f"{mean(gaps):+.5f} ± {interval(gaps):.5f}"
        print(
            f"| {way.name} | {way.dropout} | {way.share or ''} | {results[0]['products']:,} | "
            f"{validation:.5f} | {mean(test):.5f} ± {interval(test):.5f} | {gap} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
