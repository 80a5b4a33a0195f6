"""Does distillation improve a student with half of the dense FLOPs?

The original is the DCN-v2 of ``benchmarks/ctr.py`` on Frappe, with a 400-400-400 perceptron
parallel to its cross layers. The student has a perceptron of 256-256-256, so that its dense layers
have 48 % of the original's multiplications. All variants train this student with the training
settings of the original, except dropout:

- ``scratch``: from random weights, on the labels only, like the original.
- ``pointwise``, ``listwise`` or ``calibrated_listwise``: with the step ``distill`` and the
  distillation loss of this name, on labels and soft labels. The student's tables start with the
  weights of the original's tables and are trained further.

The soft labels are the mean predictions of one or more teachers: the original and the originals of
the next seeds. Their weight in the loss is the soft share. A variant may also train on unlabelled
rows, the bench's split ``traffic``. Each of them is the request of a training row (all inputs
except the app, which is the field ``item``) with a randomly drawn app: a server scores many apps
per request, and users see few of them. List losses use one list per request.

Validation rows of the first seed select dropout, soft share and amount of traffic (``--tune``).
Validation rows also select the best epoch of every training. Every trained student is evaluated on
test rows too, also with ``--tune``, but they select nothing. The seed determines the original, the
student's initial weights and the row order.

Printed are the mean over seeds ± half the width of its 95 % interval (Student's t), and the mean
difference to the student trained from scratch with the same seed.

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
    TRAINING_SETTINGS,
    Name,
    Part,
    auc,
    build_architecture,
    compute_interval_half_width,
    create_parser,
    data_folder,
    default_cache,
    load_baseline,
    load_split,
    predict,
    prepare_splits,
    save_split,
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
from examples.public_data import DataMissing

NAME: Name = "frappe"
ORIGINALS = 5  # trained networks, of seeds 0 to 4
STUDENT_HIDDEN = [256, 256, 256]
FROM_SCRATCH = "scratch"
SETTINGS = TRAINING_SETTINGS[NAME]
APP_SEED = 7  # of the random apps of unlabelled rows
EVALUATED: tuple[Part, ...] = ("validation", "test")


def count_multiplications(module: nn.Module) -> int:
    """Return the number of multiplications of all dense layers for one row."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


@dataclass(frozen=True)
class Variant:
    """How a student is trained.

    Attributes:
        name: the distillation loss, or ``scratch`` for training without soft labels.
        dropout: dropout probability of the student.
        soft_share: weight of the soft labels in the loss, in [0, 1]; the labels have the rest.
        teachers: number of originals whose mean predictions are the soft labels.
        traffic: number of unlabelled rows per labelled row; 0 trains on labelled rows only.
    """

    name: str
    dropout: float
    soft_share: float = 0.0
    teachers: int = 1
    traffic: int = 0

    def cells(self) -> str:
        """Format the settings as the cells of a line under ``SETTINGS_HEADER``."""
        if self.name == FROM_SCRATCH:
            return f"{self.name} | | | {self.dropout} | "
        rows = str(self.traffic) if self.traffic else ""
        return f"{self.name} | {self.teachers} | {rows} | {self.dropout} | {self.soft_share}"


SETTINGS_HEADER = "student | teachers | traffic, rows per labelled row | dropout | soft share"
TUNING_VARIANTS = (  # name, dropout, soft share
    *(Variant(FROM_SCRATCH, dropout) for dropout in (0.2, 0.3, 0.5)),
    *(Variant("pointwise", dropout, 0.5) for dropout in (0.3, 0.5)),
    Variant("pointwise", 0.3, 0.7),
    Variant("pointwise", 0.3, 0.7, teachers=3),
    *(Variant("pointwise", 0.3, 0.7, teachers=count, traffic=1) for count in (1, 3)),
    Variant("pointwise", 0.3, 0.7, teachers=3, traffic=3),
    *(Variant("listwise", 0.3, weight, teachers=3, traffic=1) for weight in (0.1, 0.5)),
    Variant("calibrated_listwise", 0.3, 0.7, teachers=3, traffic=1),
)
# The variants with the best validation AUC, by loss and number of teachers; scratch is first.
VARIANTS = (
    Variant(FROM_SCRATCH, 0.3),
    Variant("pointwise", 0.5, 0.5),
    Variant("pointwise", 0.3, 0.7, teachers=3, traffic=3),
    Variant("listwise", 0.3, 0.1, teachers=3, traffic=1),
)


# --- training data ----------------------------------------------------------------------------


def add_request_groups(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add ``@group``, the index of each row's request, int64 ``(rows,)``.

    Rows that differ only in the app belong to the same request.
    """
    request = np.stack([ids.numpy() for name, ids in inputs.items() if name != "item"], axis=1)
    _, group = np.unique(request, axis=0, return_inverse=True)
    return {**inputs, "@group": torch.from_numpy(group.reshape(-1).copy())}


def write_traffic(times: int, folder: Path, cache: Path) -> Split:
    """Write the split of unlabelled rows, unless it is in ``cache``, and return it.

    It has the request of every training row ``times`` times, with randomly drawn apps.
    """
    traffic_folder = cache / NAME / f"traffic-{times}"
    description = traffic_folder / "split.json"
    if description.is_file():
        return Split.model_validate_json(description.read_text())
    splits, rows = prepare_splits(NAME, folder, cache)
    inputs, label = load_split(splits["train"])
    requests = {name: ids.repeat(times) for name, ids in inputs.items()}
    count = len(label) * times
    generator = torch.Generator().manual_seed(APP_SEED)
    requests["item"] = torch.randint(rows["item"], (count,), generator=generator)
    labels = torch.full((count,), torch.nan)
    split = save_split({**add_request_groups(requests), "@label": labels}, traffic_folder)
    description.write_text(split.model_dump_json())
    return split


def compute_traffic_logits(seed: int, times: int, folder: Path, cache: Path) -> Tensor:
    """Return one original's logits of the unlabelled rows, float32 ``(rows,)``; cached."""
    logits_folder = cache / NAME / f"seed{seed}" / f"traffic-{times}"
    if not logits_folder.is_dir():
        inputs, _ = load_split(write_traffic(times, folder, cache))
        del inputs["@group"]
        model, _ = load_baseline(NAME, seed, folder, cache)
        save_split({"score": predict(model.module, inputs)}, logits_folder)
    return load_file(logits_folder / "data.safetensors")["score"]


def build_bench(
    variant: Variant, seed: int, folder: Path, cache: Path, output_folder: Path
) -> tuple[Model, Bench]:
    """Return an original and the bench of its student.

    Splits that are not in ``cache`` are written to ``output_folder``.
    """
    model, bench = load_baseline(NAME, seed, folder, cache)
    teachers = [(seed + offset) % ORIGINALS for offset in range(variant.teachers)]
    inputs, label = load_split(prepare_splits(NAME, folder, cache)[0]["train"])
    splits = {
        "train": save_split(
            {**add_request_groups(inputs), "@label": label}, output_folder / "train"
        )
    }
    soft = [load_baseline(NAME, teacher, folder, cache)[1].soft_labels for teacher in teachers]
    soft_scores = [
        load_file(Path(split.path) / "data.safetensors")["score"] for split in soft if split
    ]
    splits["soft_labels"] = save_split(
        {"score": mean_predictions(soft_scores, "logit")}, output_folder / "soft_labels"
    )
    if variant.traffic:
        soft_scores = [
            compute_traffic_logits(teacher, variant.traffic, folder, cache) for teacher in teachers
        ]
        splits["traffic"] = write_traffic(variant.traffic, folder, cache)
        soft_traffic = save_split(
            {"score": mean_predictions(soft_scores, "logit")}, output_folder / "traffic_soft_labels"
        )
        splits["traffic_soft_labels"] = soft_traffic
    return model, bench.model_copy(update=splits)


# --- students --------------------------------------------------------------------------------


def build_distill_step(variant: Variant, epochs: int) -> Distill:
    """Return the ``distill`` step that trains the student."""
    return Distill(
        student={"hidden": STUDENT_HIDDEN, "dropout": variant.dropout},
        loss=cast("SoftLoss", variant.name),
        soft_share=variant.soft_share,
        rows="both" if variant.traffic else "train",
        training=Training(
            epochs=epochs,
            batch=SETTINGS.batch,
            learning_rate=SETTINGS.learning_rate,
            patience=SETTINGS.patience,
            warmup=0,
            tables=True,
            table_l2=SETTINGS.table_l2,
        ),
    )


def train_from_scratch(
    variant: Variant, seed: int, folder: Path, cache: Path, epochs: int
) -> nn.Module:
    """Train the student's network like the original, without a teacher."""
    splits, rows = prepare_splits(NAME, folder, cache)
    arch = build_architecture(rows, SETTINGS)
    config = {**arch.config, "hidden": STUDENT_HIDDEN, "dropout": variant.dropout}
    arch = arch.model_copy(update={"config": config})
    settings = replace(SETTINGS, epochs=epochs)
    return train(arch, settings, splits["train"], splits["validation"], seed)[0]


def measure(variant: Variant, seed: int, folder: Path, cache: Path, epochs: int) -> Any:
    """Train a student and return its AUC and GAUC on validation and test rows; cached."""
    result_file = cache / "students" / f"{digest([asdict(variant), epochs])[:16]}-{seed}.json"
    if result_file.is_file():
        return json.loads(result_file.read_text())
    start = time.perf_counter()
    if variant.name == FROM_SCRATCH:
        module = train_from_scratch(variant, seed, folder, cache, epochs)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            model, bench = build_bench(variant, seed, folder, cache, Path(temporary))
            module = run(
                build_distill_step(variant, epochs), model, bench, Path(temporary) / "student"
            ).module
    splits, _ = prepare_splits(NAME, folder, cache)
    result: dict[str, Any] = {}
    for part in EVALUATED:
        result[part], result[f"{part} gauc"] = evaluate(module, splits[part])
    result["products"] = count_multiplications(module)  # the multiplications of one row
    result["seconds"] = time.perf_counter() - start
    result_file.parent.mkdir(parents=True, exist_ok=True)
    result_file.write_text(json.dumps(result))
    print(variant, seed, json.dumps(result), file=sys.stderr, flush=True)
    return result


def evaluate(module: nn.Module, split: Split) -> tuple[float, float]:
    """Return the AUC of all rows, and the mean AUC within users, weighted by their rows (GAUC)."""
    inputs, label = load_split(split)
    score = predict(module, inputs).numpy()
    users = inputs["user"].numpy()
    return point_estimates.auc(label.numpy(), score), point_estimates.gauc(
        label.numpy(), score, users
    )


def tune(folder: Path, cache: Path, epochs: int) -> None:
    """Print the validation AUC of all tuning variants on the first network."""
    print(f"| {SETTINGS_HEADER} | validation AUC |")
    print("|---|---|---|---|---|---|")
    for variant in TUNING_VARIANTS:
        value = measure(variant, 0, folder, cache, epochs)["validation"]
        print(f"| {variant.cells()} | {value:.5f} |", flush=True)


def compare(seeds: int, folder: Path, cache: Path, epochs: int) -> None:
    """Print one line per variant, with its mean difference to the student from scratch."""
    splits, _ = prepare_splits(NAME, folder, cache)
    originals = [load_baseline(NAME, seed, folder, cache)[0].module for seed in range(seeds)]
    baseline = [evaluate(module, splits["test"]) for module in originals]
    print(
        f"| {SETTINGS_HEADER} | multiplications | validation AUC | test AUC | "
        f"difference to scratch | test GAUC | difference to scratch |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    cells = [
        f"{mean(values):.5f} ± {compute_interval_half_width(list(values)):.5f}"
        for values in zip(*baseline, strict=True)
    ]
    validation = mean(auc(module, splits["validation"]) for module in originals)
    multiplications = count_multiplications(originals[0])
    print(
        f"| none: the originals | | | {SETTINGS.dropout} | | {multiplications:,} | "
        f"{validation:.5f} | {cells[0]} | | {cells[1]} | |"
    )
    from_scratch: dict[str, list[float]] = {}  # AUC and GAUC of the first variant, by seed
    for variant in VARIANTS:
        results = [measure(variant, seed, folder, cache, epochs) for seed in range(seeds)]
        cells = [f"{results[0]['products']:,}", f"{mean(r['validation'] for r in results):.5f}"]
        for part in ("test", "test gauc"):
            values = [result[part] for result in results]
            reference = from_scratch.setdefault(part, values)
            differences = [value - other for value, other in zip(values, reference, strict=True)]
            cells += [f"{mean(values):.5f} ± {compute_interval_half_width(values):.5f}"]
            difference = (
                f"{mean(differences):+.5f} ± {compute_interval_half_width(differences):.5f}"
            )
            cells += ["" if variant is VARIANTS[0] else difference]
        print(f"| {variant.cells()} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tuning results with ``--tune``, else the comparison."""
    parser = create_parser((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, default=SETTINGS.epochs, help="largest number of epochs"
    )
    parser.add_argument(
        "--tune", action="store_true", help="print the tuning results on validation rows instead"
    )
    args = parser.parse_args()
    logging.getLogger("compressors").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    cache = args.cache or default_cache()
    try:
        folder = data_folder(args.data)
    except DataMissing as error:
        sys.exit(str(error))
    if args.tune:
        tune(folder, cache, args.epochs)
    else:
        compare(args.seeds, folder, cache, args.epochs)


if __name__ == "__main__":
    main()
