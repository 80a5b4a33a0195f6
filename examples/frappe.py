"""Train DeepFM, xDeepFM or DLRM on Frappe and write data and model as the draft of a bundle.

Run ``python -m examples.frappe DRAFT --model deepfm|xdeepfm|dlrm --data FOLDER``. The items of
Frappe are apps, and the labels say which apps a user used. The folder contains the split that the
authors of NFM (neural factorization machines) published, as the files in ``FILES``. Its training
file is not public any more, so it is a reconstruction: the apps of its negative rows were drawn at
random. ``docs/results/frappe.md`` describes the data. A draft is the folder of a bundle before it
is packed.
"""

import gzip
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Architecture, Signature
from compressors.metrics.point_estimates import auc
from examples.deepfm import DeepFM
from examples.dlrm import DLRM
from examples.draft import CALIBRATION_ROWS, create_parser, run_script, write_draft
from examples.public_data import find_data_folder
from examples.training import deterministic, train_with_early_stopping
from examples.xdeepfm import XDeepFM

ModelName = Literal["deepfm", "xdeepfm", "dlrm"]
Ints = NDArray[np.int64]

FILES = {
    "train": "derived/train.rebuilt.seed2025.csv.gz",
    "validation": "frappe.validation.libfm.gz",
    "test": "frappe.test.libfm.gz",
}
FIELDS = {  # rows of each table; the files number the ids of all fields, in this order
    "user": 957,
    "item": 4082,
    "daytime": 7,
    "weekday": 7,
    "isweekend": 2,
    "homework": 3,
    "cost": 2,
    "weather": 9,
    "country": 80,
    "city": 233,
}
REMEDY = f"Put the Frappe files of NFM into a folder: {', '.join(FILES.values())}."
NETWORKS: dict[ModelName, type[nn.Module]] = {
    "deepfm": DeepFM,
    "xdeepfm": XDeepFM,
    "dlrm": DLRM,
}


@dataclass(frozen=True)
class Training:
    """Training settings, those of the tuned DCN-v2 of ``benchmarks/ctr.py``."""

    dim: int = 10
    hidden: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.5
    batch: int = 4096
    learning_rate: float = 1e-3
    table_l2: float = 0.05
    epochs: int = 60
    patience: int = 3
    seed: int = 1
    threads: int = 1


# --- data ------------------------------------------------------------------------------------


def read_integers(path: Path) -> Ints:
    """Read a compressed file of comma-separated integers, without its header."""
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", skiprows=1, dtype=np.int64)


def read_libfm(path: Path) -> tuple[Ints, Ints]:
    """Read ids ``(rows, fields)`` and labels ``(rows,)``; a line is ``label id:1 id:1 ...``."""
    with gzip.open(path, "rt") as file:
        lines = [line.split() for line in file]
    ids = [[int(feature.partition(":")[0]) for feature in line[1:]] for line in lines]
    return np.array(ids), np.array([int(float(line[0]) > 0) for line in lines])


def read_splits(folder: Path) -> dict[str, tuple[Ints, Ints]]:
    """Return ids int64 ``(rows, fields)`` and labels int64 ``(rows,)`` of each split.

    Ids start at 0 in each field.
    """
    table = read_integers(folder / FILES["train"])
    raw = {"train": (table[:, 1:], table[:, 0])}
    for split in ("validation", "test"):
        raw[split] = read_libfm(folder / FILES[split])
    offsets = np.cumsum([0, *FIELDS.values()])[:-1]  # the files have one id space for all fields
    return {split: (ids - offsets, label) for split, (ids, label) in raw.items()}


# --- training --------------------------------------------------------------------------------


def take_inputs(ids: Tensor, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
    """Return the network's arguments for some rows of ``ids``, int64 ``(all rows, fields)``."""
    return dict(zip(FIELDS, ids[rows].T.unbind(), strict=True))


@torch.no_grad()
def score(network: nn.Module, ids: Tensor, batch: int = 8192) -> Tensor:
    """Return the logits of all rows, float ``(rows,)``."""
    return torch.cat([network(**take_inputs(part)) for part in torch.split(ids, batch)])


def build_architecture(model: ModelName, settings: Training) -> Architecture:
    """Return the network as an import path and JSON arguments."""
    fields = [{"name": name, "rows": rows} for name, rows in FIELDS.items()]
    widths_argument = "top" if model == "dlrm" else "hidden"
    return Architecture(
        path=f"examples.{model}:{NETWORKS[model].__name__}",
        config={
            "fields": fields,
            "dim": settings.dim,
            widths_argument: list(settings.hidden),
            "dropout": settings.dropout,
            "batch_norm": True,
        },
    )


def train(
    model: ModelName,
    splits: Mapping[str, tuple[Ints, Ints]],
    settings: Training,
    log: Callable[[str], None],
) -> nn.Module:
    """Train a network and return it with the weights of its best epoch, by validation AUC."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = NETWORKS[model](**build_architecture(model, settings).config)
    ids, labels = (torch.from_numpy(array) for array in splits["train"])
    validation = torch.from_numpy(splits["validation"][0])

    def compute_loss(rows: Tensor) -> Tensor:
        logits = network(**take_inputs(ids, rows))
        return F.binary_cross_entropy_with_logits(logits, labels[rows].float())

    def validation_auc() -> float:
        return auc(splits["validation"][1], score(network, validation).numpy())

    train_with_early_stopping(
        network, len(labels), compute_loss, validation_auc, settings, generator, log
    )
    return network


# --- the draft of a bundle -------------------------------------------------------------------


def build_signature(model: ModelName) -> Signature:
    """Return the signature of a network."""
    ids = [
        {
            "kind": "id",
            "name": name,
            "table": f"tables.{name}",
            # DeepFM and xDeepFM also have a linear term: a table with one weight per id.
            "more_tables": [] if model == "dlrm" else [f"linear.{name}"],
        }
        for name in FIELDS
    ]
    click = {"name": "score", "kind": "ctr", "form": "logit", "label": "label", "metric": "auc"}
    return Signature.model_validate({"inputs": ids, "outputs": [click]})


def to_table(ids: Ints, labels: Ints) -> pa.Table:
    """Return the columns of a split, as the signature names them."""
    columns = dict(zip(FIELDS, map(pa.array, ids.T), strict=True))
    return pa.table({**columns, "label": pa.array(labels)})


def train_and_write(
    folder: Path,
    data: Path,
    model: ModelName,
    settings: Training,
    log: Callable[[str], None],
) -> None:
    """Read the data, train the network, and write the draft of a bundle.

    Args:
        folder: folder of the draft.
        data: folder of the public files.
        model: the network to train.
        settings: training settings.
        log: called with each line of progress.
    """
    splits = read_splits(data)
    with deterministic(settings.threads):
        network = train(model, splits, settings, log)
    tables = {split: to_table(*arrays) for split, arrays in splits.items()}
    permutation = np.random.default_rng(settings.seed).permutation(len(tables["train"]))
    tables["calibration"] = tables["train"].take(np.sort(permutation[:CALIBRATION_ROWS]))
    write_draft(
        folder,
        name=f"frappe-{model}",
        architecture=build_architecture(model, settings),
        network=network,
        signature=build_signature(model),
        splits=tables,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    parser = create_parser("examples.frappe", main.__doc__)
    parser.add_argument("--model", choices=get_args(ModelName), default="deepfm")
    args = parser.parse_args(argv)
    settings = Training(seed=args.seed)
    if args.epochs is not None:
        settings = replace(settings, epochs=args.epochs)

    def write(log: Callable[[str], None]) -> None:
        data = find_data_folder(args.data, "frappe", REMEDY)
        train_and_write(args.folder.absolute(), data, args.model, settings, log)

    return run_script(args.folder, write)


if __name__ == "__main__":
    sys.exit(main())
