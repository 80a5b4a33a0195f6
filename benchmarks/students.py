"""Is a student with half the dense FLOPs better for having had a teacher?

Frappe's DCN-v2 (``benchmarks/ctr.py``): the original has 400-400-400 beside its cross layers, the
student 256-256-256, 48 % of the multiplications. Several ways to the same student, each with the
original's own recipe (Adam, its rate cut by ten, batch norm, penalty on whole tables, batch,
patience) and a dropout of its own:

- scratch: as the original was trained, from drawn weights and the labels.
- taught: ``distill`` with a loss of that name, tables taken over from the original and trained on,
  labels and soft labels.
- taught on traffic: the same, with unlabelled rows beside the labelled ones: requests of training
  rows, each with an app that is drawn anew, as a server scores many apps for a request of which
  few are ever seen. With several teachers, these are the original and those of the next seeds.

A list, where a loss looks at lists, is a request: rows that differ in nothing but the app. Dropout
and the share of soft labels are chosen on validation rows of the first network (``--tune``), best
epochs as well; test rows are read for the table alone. A seed draws the original, the student and
the order of rows.

    python -m benchmarks.students --tune
    python -m benchmarks.students --seeds 5
"""

import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.ctr import (
    RECIPES,
    DataMissing,
    Name,
    Part,
    architecture,
    arguments,
    auc,
    baseline,
    data_folder,
    default_cache,
    interval,
    prepared,
    scores,
    stored,
    tensors,
    train,
)
from compressors.contracts import Bench, Split, digest
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.distill.losses import SoftLoss
from compressors.distill.soft_labels import mean_predictions
from compressors.distill.training.settings import Training
from compressors.metrics import point_estimates

NAME: Name = "frappe"
ORIGINALS = 5
HIDDEN = [256, 256, 256]
SCRATCH = "scratch"
RECIPE = RECIPES[NAME]
TRAFFIC_SEED = 7
JUDGED: tuple[Part, ...] = ("validation", "test")


def dense_products(module: nn.Module) -> int:
    """Multiplications of all dense layers for one row."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


@dataclass(frozen=True)
class Way:
    """How a student is made; ``scratch`` has no soft labels.

    ``traffic`` is how many unlabelled rows there are for each labelled one.
    """

    name: str
    dropout: float
    share: float = 0.0
    teachers: int = 1
    traffic: int = 0

    def cells(self) -> str:
        """What it is, for a table."""
        if self.name == SCRATCH:
            return f"{self.name} | | | {self.dropout} | "
        rows = f"{self.traffic} a row" if self.traffic else ""
        return f"{self.name} | {self.teachers} | {rows} | {self.dropout} | {self.share}"


HEAD = "student | teachers | traffic | dropout | soft share"
TRIED = (
    *(Way(SCRATCH, dropout) for dropout in (0.2, 0.3, 0.5)),
    *(Way("pointwise", dropout, 0.5) for dropout in (0.3, 0.5)),
    Way("pointwise", 0.3, 0.7),
    Way("pointwise", 0.3, 0.7, teachers=3),
    *(Way("pointwise", 0.3, 0.7, count, 1) for count in (1, 3)),
    Way("pointwise", 0.3, 0.7, teachers=3, traffic=3),
    *(Way("listwise", 0.3, share, teachers=3, traffic=1) for share in (0.1, 0.5)),
    Way("calibrated_listwise", 0.3, 0.7, teachers=3, traffic=1),
)
# The best of each kind on validation rows.
WAYS = (
    Way(SCRATCH, 0.3),
    Way("pointwise", 0.5, 0.5),
    Way("pointwise", 0.3, 0.7, teachers=3, traffic=3),
    Way("listwise", 0.3, 0.1, teachers=3, traffic=1),
)


# --- what they learn from --------------------------------------------------------------------


def with_requests(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, with the number of the request that each belongs to."""
    request = np.stack([ids.numpy() for name, ids in inputs.items() if name != "item"], axis=1)
    _, number = np.unique(request, axis=0, return_inverse=True)
    return {**inputs, "@group": torch.from_numpy(number.reshape(-1).copy())}


def traffic_of(times: int, folder: Path, cache: Path) -> Split:
    """Requests of the training rows, so many times, each with an app drawn anew; no labels."""
    place = cache / NAME / f"traffic-{times}"
    kept = place / "split.json"
    if kept.is_file():
        return Split.model_validate_json(kept.read_text())
    splits, rows = prepared(NAME, folder, cache)
    inputs, label = tensors(splits["train"])
    drawn = {name: ids.repeat(times) for name, ids in inputs.items()}
    count = len(label) * times
    apps = torch.Generator().manual_seed(TRAFFIC_SEED)
    drawn["item"] = torch.randint(rows["item"], (count,), generator=apps)
    labels = torch.full((count,), torch.nan)
    split = stored({**with_requests(drawn), "@label": labels}, place)
    kept.write_text(split.model_dump_json())
    return split


def answered(seed: int, times: int, folder: Path, cache: Path) -> Tensor:
    """What one original answers to the traffic, computed once: float32 ``(rows,)``."""
    place = cache / NAME / f"seed{seed}" / f"traffic-{times}"
    if not place.is_dir():
        inputs, _ = tensors(traffic_of(times, folder, cache))
        del inputs["@group"]
        model, _ = baseline(NAME, seed, folder, cache)
        stored({"score": scores(model.module, inputs)}, place)
    return load_file(place / "data.safetensors")["score"]


def bench_of(way: Way, seed: int, folder: Path, cache: Path, place: Path) -> tuple[Model, Bench]:
    """An original, and what its student learns from; what is not kept is written to ``place``."""
    model, bench = baseline(NAME, seed, folder, cache)
    teachers = [(seed + step) % ORIGINALS for step in range(way.teachers)]
    inputs, label = tensors(prepared(NAME, folder, cache)[0]["train"])
    held = {"train": stored({**with_requests(inputs), "@label": label}, place / "train")}
    soft = [baseline(NAME, each, folder, cache)[1].soft_labels for each in teachers]
    soft_scores = [
        load_file(Path(split.path) / "data.safetensors")["score"] for split in soft if split
    ]
    held["soft_labels"] = stored(
        {"score": mean_predictions(soft_scores, "logit")}, place / "soft_labels"
    )
    if way.traffic:
        soft_scores = [answered(each, way.traffic, folder, cache) for each in teachers]
        held["traffic"] = traffic_of(way.traffic, folder, cache)
        soft_traffic = stored(
            {"score": mean_predictions(soft_scores, "logit")}, place / "traffic_soft_labels"
        )
        held["traffic_soft_labels"] = soft_traffic
    return model, bench.model_copy(update=held)


# --- students --------------------------------------------------------------------------------


def distilled(way: Way, epochs: int) -> Distill:
    """The step that makes the student."""
    return Distill(
        student={"hidden": HIDDEN, "dropout": way.dropout},
        loss=cast("SoftLoss", way.name),
        soft_share=way.share,
        rows="both" if way.traffic else "train",
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


def from_scratch(way: Way, seed: int, folder: Path, cache: Path, epochs: int) -> nn.Module:
    """The student's network trained as its original was."""
    splits, rows = prepared(NAME, folder, cache)
    built = architecture(rows, RECIPE)
    config = {**built.config, "hidden": HIDDEN, "dropout": way.dropout}
    built = built.model_copy(update={"config": config})
    recipe = replace(RECIPE, epochs=epochs)
    return train(built, recipe, splits["train"], splits["validation"], seed)[0]


def found(way: Way, seed: int, folder: Path, cache: Path, epochs: int) -> Any:
    """AUC on validation and test rows of one student, trained unless ``cache`` knows it."""
    place = cache / "students" / f"{digest([asdict(way), epochs])[:16]}-{seed}.json"
    if place.is_file():
        return json.loads(place.read_text())
    begun = time.perf_counter()
    if way.name == SCRATCH:
        module = from_scratch(way, seed, folder, cache, epochs)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            model, bench = bench_of(way, seed, folder, cache, Path(scratch))
            module = run(distilled(way, epochs), model, bench, Path(scratch) / "made").module
    splits, _ = prepared(NAME, folder, cache)
    told: dict[str, Any] = {}
    for part in JUDGED:
        told[part], told[f"{part} gauc"] = judged(module, splits[part])
    told["products"] = dense_products(module)
    told["seconds"] = time.perf_counter() - begun
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(told))
    print(way, seed, json.dumps(told), file=sys.stderr, flush=True)
    return told


def judged(module: nn.Module, split: Split) -> tuple[float, float]:
    """AUC over all rows, and over those of each user (GAUC)."""
    inputs, label = tensors(split)
    score = scores(module, inputs).numpy()
    users = inputs["user"].numpy()
    return point_estimates.auc(label.numpy(), score), point_estimates.gauc(
        label.numpy(), score, users
    )


def tune(folder: Path, cache: Path, epochs: int) -> None:
    """Print the validation AUC of all that is tried on the first network."""
    print(f"| {HEAD} | validation AUC |")
    print("|---|---|---|---|---|---|")
    for way in TRIED:
        value = found(way, 0, folder, cache, epochs)["validation"]
        print(f"| {way.cells()} | {value:.5f} |", flush=True)


def compare(seeds: int, folder: Path, cache: Path, epochs: int) -> None:
    """Print a line for each way, with the difference to the student from scratch, seed by seed."""
    splits, _ = prepared(NAME, folder, cache)
    originals = [baseline(NAME, seed, folder, cache)[0].module for seed in range(seeds)]
    base = [judged(module, splits["test"]) for module in originals]
    print(
        f"| {HEAD} | products | validation AUC | test AUC | to scratch | test GAUC | to scratch |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    cells = [f"{mean(each):.5f} ± {interval(list(each)):.5f}" for each in zip(*base, strict=True)]
    validation = mean(auc(module, splits["validation"]) for module in originals)
    print(
        f"| none: the originals | | | {RECIPE.dropout} | | {dense_products(originals[0]):,} | "
        f"{validation:.5f} | {cells[0]} | | {cells[1]} | |"
    )
    first: dict[str, list[float]] = {}
    for way in WAYS:
        results = [found(way, seed, folder, cache, epochs) for seed in range(seeds)]
        cells = [f"{results[0]['products']:,}", f"{mean(r['validation'] for r in results):.5f}"]
        for part in ("test", "test gauc"):
            values = [result[part] for result in results]
            against = first.setdefault(part, values)
            gaps = [own - other for own, other in zip(values, against, strict=True)]
            cells += [f"{mean(values):.5f} ± {interval(values):.5f}"]
            cells += ["" if way is WAYS[0] else f"{mean(gaps):+.5f} ± {interval(gaps):.5f}"]
        print(f"| {way.cells()} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print what was tried, or the table."""
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
    else:
        compare(asked.seeds, folder, cache, asked.epochs)


if __name__ == "__main__":
    main()
