"""Tuned click models on public data: the baselines that the other benchmarks compress.

The model is DCN-v2 (``examples/dcnv2.py``) with embeddings of width 10 and three cross layers
parallel to a perceptron of widths 400-400-400. The data sets are

- ``frappe``: app usage, 10 fields, 5,382 table rows (215 kB). The public split has 202,027
  training, 57,722 validation and 28,860 test rows. The published training file is not available, so
  the training rows are a reconstruction: the apps of negative rows are drawn at random. BARS, a
  benchmark of recommendation models, reports an AUC of 0.9845 of DCNv2 for the published file.
- ``movielens-tag``: a user tags a film, 3 fields, 75,217 table rows (3.0 MB). Only the public test
  file is read: 200,686 rows, shuffled by ``numpy.random.default_rng(0)`` and split 7:1:2. Published
  results refer to the whole data set, which is ten times as large.

Two settings determine the quality of these baselines: the L2 penalty on *whole* tables in every
training step (half the coefficient times the squared norm), and early stopping on validation rows.
Without them the same networks reach AUCs of only 0.978 (``frappe``) and 0.893 (``movielens-tag``),
and any compression of their tables seems to improve the AUC. Test rows are used only for printed
results, not for any choice.

Printed results are the mean over seeds ± half the width of its 95 % interval (Student's t).

    python -m benchmarks.ctr --seeds 5        # trains missing networks, prints both AUCs
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from compressors.contracts import Architecture, Bench, IdInput, Network, Output, Signature, Split
from compressors.core.model import Model
from compressors.metrics import point_estimates
from examples import frappe
from examples.dcnv2 import DCNv2
from examples.public_data import DATA_VARIABLE, DataMissing
from infra.settings import load_settings

Name = Literal["frappe", "movielens-tag"]
Part = Literal["train", "validation", "test"]
Ints = NDArray[np.int64]

PARTS: tuple[Part, ...] = get_args(Part)
SCORING_ROWS = 8192
"""Rows per batch of ``predict``."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a baseline is trained with Adam.

    Attributes:
        table_l2: coefficient of the L2 penalty on the tables.
        dropout: probability of dropout in the perceptron.
        batch_norm: whether the perceptron has batch norms.
        learning_rate: of the first epochs; divided by 10 after each epoch that does not improve the
            validation AUC.
        batch: rows per batch.
        epochs: largest number of epochs.
        patience: number of consecutive epochs without improvement after which training ends.
        grace: number of first epochs that neither count for ``patience`` nor lower the learning
            rate. MovieLens networks stagnate for an epoch or two early in training. If the learning
            rate were lowered then, some of them would end with an AUC that is 0.005 lower.
    """

    table_l2: float
    dropout: float
    batch_norm: bool
    learning_rate: float
    batch: int = 4096
    epochs: int = 60
    patience: int = 3
    grace: int = 0


TRAINING_SETTINGS: dict[Name, TrainingSettings] = {  # selected by validation AUC
    "frappe": TrainingSettings(table_l2=0.05, dropout=0.5, batch_norm=True, learning_rate=1e-3),
    "movielens-tag": TrainingSettings(
        table_l2=0.1, dropout=0.3, batch_norm=False, learning_rate=2e-3, grace=10
    ),
}


# --- data ------------------------------------------------------------------------------------


def data_folder(option: Path | None) -> Path:
    """Return the folder of ``--data``, else the folder in the variable ``RECPRESS_DATA``.

    Raises:
        DataMissing: the folder does not exist, or neither is set.
    """
    root = os.environ.get(DATA_VARIABLE)
    folder = option or (Path(root) if root else None)
    if folder is None or not folder.is_dir():
        raise DataMissing(
            f"Expected a folder with the click data, got "
            f"{folder or f'neither --data nor {DATA_VARIABLE}'}. Put the public Frappe "
            f"files (examples/frappe.py) into 'frappe' and MovieLens tags into "
            f"'movielenslatest-x1-test' in one folder, and pass that folder with --data."
        )
    return folder


def read(name: Name, folder: Path) -> tuple[dict[Part, tuple[Ints, Ints]], dict[str, int]]:
    """Read a data set.

    Returns:
        By part, ids int64 ``(rows, fields)``, which start at 0 in each field, and labels int64
        ``(rows,)``; and by field, the number of table rows.
    """
    parts: Mapping[str, tuple[Ints, Ints]]
    if name == "frappe":
        parts, rows = frappe.read_splits(folder / "frappe"), dict(frappe.FIELDS)
    else:
        table = frappe.read_integers(folder / "movielenslatest-x1-test" / "test.csv.gz")
        table = table[np.random.default_rng(0).permutation(len(table))]
        encoded = [np.unique(column, return_inverse=True) for column in table[:, 1:].T]
        fields = ("user", "item", "tag")
        rows = {field: len(unique) for field, (unique, _) in zip(fields, encoded, strict=True)}
        # The first column of the file is the label.
        ids, label = np.stack([column_ids for _, column_ids in encoded], axis=1), table[:, 0]
        edges = (0, int(0.7 * len(ids)), int(0.8 * len(ids)), len(ids))
        parts = {
            part: (ids[edges[k] : edges[k + 1]], label[edges[k] : edges[k + 1]])
            for k, part in enumerate(PARTS)
        }
    for part, (ids, _) in parts.items():
        assert bool(((ids >= 0) & (ids < np.array(list(rows.values())))).all()), (name, part)
    return {part: parts[part] for part in PARTS}, rows


def build_signature(rows: dict[str, int]) -> Signature:
    """Return the signature of the network for fields with these numbers of table rows."""
    return Signature(
        inputs=tuple(
            IdInput(name=name, table=f"tables.{name}", dtype="int64", out_of_range="clamp")
            for name in rows
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )


def prepare_splits(
    name: Name, folder: Path, cache: Path
) -> tuple[dict[Part, Split], dict[str, int]]:
    """Return the splits as tensor files, and the number of table rows of each field.

    The first call reads the data set and writes the files to ``cache``.
    """
    description = cache / name / "data.json"
    if not description.is_file():
        parts, rows = read(name, folder)
        splits = {}
        for part, (ids, label) in parts.items():
            tensors = {field: torch.from_numpy(ids[:, k].copy()) for k, field in enumerate(rows)}
            tensors["@label"] = torch.from_numpy(label.astype(np.float32))
            splits[part] = save_split(tensors, cache / name / part)
        description.write_text(
            json.dumps({"rows": rows, "splits": {k: v.model_dump() for k, v in splits.items()}})
        )
    stored = json.loads(description.read_text())
    return {part: Split(**stored["splits"][part]) for part in PARTS}, stored["rows"]


def save_split(tensors: dict[str, Tensor], folder: Path) -> Split:
    """Write tensors to the file of a split, as ``Bench`` expects it.

    Args:
        tensors: inputs by name and labels as ``@label``; or only soft labels, as ``score``.
        folder: folder of the split; created if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "data.safetensors")
    digest = hashlib.sha256((folder / "data.safetensors").read_bytes()).hexdigest()
    return Split(path=str(folder), sha256=digest, rows=len(next(iter(tensors.values()))))


def load_split(split: Split) -> tuple[dict[str, Tensor], Tensor]:
    """Load the inputs, by name, and the labels of a split."""
    inputs = load_file(Path(split.path) / "data.safetensors")
    label = inputs.pop("@label")
    return inputs, label


# --- the network -----------------------------------------------------------------------------


def build_architecture(rows: dict[str, int], settings: TrainingSettings) -> Architecture:
    """Return the architecture of the tuned DCN-v2."""
    return Architecture(
        path="examples.dcnv2:DCNv2",
        config={
            "fields": [{"name": name, "rows": count} for name, count in rows.items()],
            "dim": 10,
            "cross_layers": 3,
            "hidden": [400, 400, 400],
            "dropout": settings.dropout,
            "batch_norm": settings.batch_norm,
        },
    )


@torch.no_grad()
def predict(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of all rows, float32 ``(rows,)``."""
    module.eval()
    count = len(next(iter(inputs.values())))
    parts = [
        module(**{name: ids[start : start + SCORING_ROWS] for name, ids in inputs.items()})
        for start in range(0, count, SCORING_ROWS)
    ]
    return torch.cat(parts)


def auc(module: nn.Module, split: Split) -> float:
    """Return the AUC of a network on the rows of a split."""
    inputs, label = load_split(split)
    return point_estimates.auc(label.numpy(), predict(module, inputs).numpy())


def train(
    arch: Architecture, settings: TrainingSettings, training: Split, validation: Split, seed: int
) -> tuple[nn.Module, float]:
    """Train a network; return it with the weights of its best epoch, and its validation AUC."""
    torch.manual_seed(seed)
    module = DCNv2(**arch.config)
    inputs, label = load_split(training)
    tables = list(module.tables.parameters())
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.learning_rate)
    best, best_state, epochs_without_gain = 0.0, module.state_dict(), 0
    for epoch in range(settings.epochs):
        module.train()
        for batch in torch.randperm(len(label)).split(settings.batch):
            logit = module(**{name: ids[batch] for name, ids in inputs.items()})
            loss = binary_cross_entropy_with_logits(logit, label[batch])
            for table in tables:
                loss = loss + settings.table_l2 / 2 * table.square().sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        validation_auc = auc(module, validation)
        if validation_auc > best:
            best, epochs_without_gain = validation_auc, 0
            best_state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
            continue
        if epoch < settings.grace:
            continue
        epochs_without_gain += 1
        for group in optimizer.param_groups:
            group["lr"] *= 0.1
        if epochs_without_gain >= settings.patience:
            break
    module.load_state_dict(best_state)
    return module.eval(), best


def load_baseline(name: Name, seed: int, folder: Path, cache: Path) -> tuple[Model, Bench]:
    """Load a trained network and its bench from ``cache``; train the network first if missing.

    The bench is what a compression step may use: the signature, the splits except test, and soft
    labels. Its soft labels are the network's logits on the training rows. The file ``facts.json``
    has the split of the soft labels, the validation AUC and the seconds of training. It is written
    last: if it exists, all files of the network are complete.
    """
    splits, rows = prepare_splits(name, folder, cache)
    settings = TRAINING_SETTINGS[name]
    arch = build_architecture(rows, settings)
    run_folder = cache / name / f"seed{seed}"
    if not (run_folder / "facts.json").is_file():
        start = time.perf_counter()
        module, best = train(arch, settings, splits["train"], splits["validation"], seed)
        run_folder.mkdir(parents=True, exist_ok=True)
        save_file(module.state_dict(), run_folder / "model.safetensors")
        soft = predict(module, load_split(splits["train"])[0])
        split = save_split({"score": soft}, run_folder / "soft_labels")
        training_record = {"soft_labels": split.model_dump(), "validation_auc": best}
        training_record["seconds"] = time.perf_counter() - start
        (run_folder / "facts.json").write_text(json.dumps(training_record))
    training_record = json.loads((run_folder / "facts.json").read_text())
    module = DCNv2(**arch.config)
    module.load_state_dict(load_file(run_folder / "model.safetensors"))
    bench = Bench(
        signature=build_signature(rows),
        train=splits["train"],
        validation=splits["validation"],
        soft_labels=Split(**training_record["soft_labels"]),
        seed=seed,
    )
    return Model(module.eval(), DCNv2, Network(architecture=arch)), bench


def default_cache() -> Path:
    """Return the folder of trained baselines if ``--cache`` is not given."""
    return load_settings().home / "benchmarks" / "ctr"


def create_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks on these models share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, help=f"folder of the data sets (or {DATA_VARIABLE})")
    parser.add_argument("--cache", type=Path, help="folder of the trained networks")
    parser.add_argument("--seeds", type=int, default=5, help="number of networks per data set")
    parser.add_argument("--only", choices=get_args(Name), help="run this data set only")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def compute_interval_half_width(values: list[float]) -> float:
    """Return half the width of the 95 % interval of the mean (Student's t); 0 for one value."""
    count = len(values)
    return float(student_t.ppf(0.975, count - 1)) * stdev(values) / count**0.5 if count > 1 else 0.0


def main() -> None:
    """Train missing baselines and print their validation and test AUC."""
    args = create_parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(args.threads)
    cache = args.cache or default_cache()
    try:
        folder = data_folder(args.data)
    except DataMissing as error:
        sys.exit(str(error))
    print("| data | seeds | AUC on validation rows | on test rows |")
    print("|---|---|---|---|")
    for name in [args.only] if args.only else get_args(Name):
        splits, _ = prepare_splits(name, folder, cache)
        aucs: dict[str, list[float]] = {"validation": [], "test": []}
        for seed in range(args.seeds):
            model, _ = load_baseline(name, seed, folder, cache)
            for part in ("validation", "test"):
                aucs[part].append(auc(model.module, splits[part]))
            print(name, seed, *(f"{v[-1]:.5f}" for v in aucs.values()), file=sys.stderr, flush=True)
        cells = [f"{mean(v):.5f} ± {compute_interval_half_width(v):.5f}" for v in aucs.values()]
        print(f"| {name} | {args.seeds} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
