"""Train MMoE with two outputs on MovieLens 100K and write data and model as the draft of a bundle.

Run ``python -m examples.movielens_tasks FOLDER``. Data, fields and split are those of
``movielens_data.py``. The outputs are ``click``, a rating of 4 or 5, and ``like``, a rating of 5. A
row without a click has no label of ``like``: this output is the probability that a click is a like.

A draft is the folder that becomes a bundle when it is packed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Architecture, Network, Signature
from compressors.metrics.point_estimates import auc
from examples.draft import run_script
from examples.mmoe import MMoE
from examples.movielens import build_signature, mask_ids
from examples.movielens_data import (
    Rows,
    build_vocabularies,
    convert_to_rows,
    describe_tables,
    encode,
    find_data_folder,
    read_ratings,
    split_by_time,
    take_calibration_rows,
    write_data,
)
from examples.training import deterministic, train_with_early_stopping

TASKS = ("click", "like")


@dataclass(frozen=True)
class Training:
    """Training settings: those of ``movielens.Training``; no other settings were compared.

    ``experts``, ``expert``, ``tower`` and ``dropout`` are arguments of ``MMoE``. ``forget_user``
    and ``forget_item`` are the shares of training rows in which this id is replaced by the unknown
    id.
    """

    dim: int = 16
    experts: int = 4
    expert: int = 128
    tower: int = 64
    dropout: float = 0.3
    batch: int = 1024
    learning_rate: float = 1e-3
    table_l2: float = 0.05
    forget_user: float = 0.2
    forget_item: float = 0.02
    epochs: int = 40
    patience: int = 3
    seed: int = 1
    threads: int = 1


@dataclass(frozen=True)
class LabelledRows:
    """Inputs of a split, and labels ``(rows, 2)`` of both tasks; NaN without a label."""

    rows: Rows
    labels: Tensor


@torch.no_grad()
def score(network: MMoE, rows: Rows, batch: int = 8192) -> Tensor:
    """Return the logits of all rows, ``(rows, 2)``; sets the network to evaluation mode."""
    network.eval()
    parts = [network(**rows.inputs(part)) for part in torch.split(torch.arange(len(rows)), batch)]
    return torch.cat([torch.stack([part[task] for task in TASKS], dim=1) for part in parts])


def compute_aucs(network: MMoE, split: LabelledRows) -> list[float]:
    """Return the AUC of each task, of the rows that have its label."""
    logits, result = score(network, split.rows), []
    for logit, label in zip(logits.T, split.labels.T, strict=True):
        has_label = ~label.isnan()
        result.append(auc(label[has_label].numpy(), logit[has_label].numpy()))
    return result


def compute_loss(logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum over tasks of the mean cross entropy of the rows that have a label."""
    losses = []
    for task, label in zip(TASKS, labels.T, strict=True):
        has_label = ~label.isnan()
        losses.append(F.binary_cross_entropy_with_logits(logits[task][has_label], label[has_label]))
    return torch.stack(losses).sum()


def train(
    config: Mapping[str, object],
    training: LabelledRows,
    validation: LabelledRows,
    settings: Training,
    log: Callable[[str], None],
) -> MMoE:
    """Train a network and return it with the weights of its best epoch.

    The metric of an epoch is the mean of the validation AUCs.
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = MMoE(**config)  # type: ignore[arg-type]  # plain JSON, checked by MMoE itself
    shares = {"user": settings.forget_user, "item": settings.forget_item}

    def compute_loss_of_rows(part: Tensor) -> Tensor:
        logits = network(**mask_ids(training.rows.inputs(part), shares, generator))
        return compute_loss(logits, training.labels[part])

    def mean_auc() -> float:
        return float(np.mean(compute_aucs(network, validation)))

    train_with_early_stopping(
        network, len(training.rows), compute_loss_of_rows, mean_auc, settings, generator, log
    )
    return network


def build_task_signature() -> Signature:
    """Return the signature of ``movielens`` with both outputs."""
    click = {"name": "click", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}
    # ``label_where``: only the labels ``like`` of rows with a click are used.
    like = {**click, "name": "like", "label": "like", "label_where": "click"}
    document = build_signature().model_dump(mode="json")
    return Signature.model_validate(document | {"outputs": [click, like]})


def write_draft(folder: Path, settings: Training, log: Callable[[str], None]) -> None:
    """Train a network and write the draft of a bundle; ``model.json`` is written last.

    Args:
        folder: folder of the draft; created if needed, files of an earlier draft are replaced.
        settings: training settings.
        log: called with each line of progress.

    Raises:
        DataMissing: the Python package that contains the data is missing, or has another version
            or other files.
    """
    splits = split_by_time(read_ratings(find_data_folder()))
    vocabularies = build_vocabularies(splits["train"])
    tables = {}
    for name, frame in splits.items():
        like = pa.array(frame["stars"] == 5, mask=frame["click"].to_numpy() == 0)
        tables[name] = encode(frame, vocabularies).append_column("like", like.cast(pa.int64()))
        log(f"{name}: {len(frame)} rows, {frame['click'].mean():.1%} clicks")
    tables["calibration"] = take_calibration_rows(tables["train"], settings.seed)
    files = write_data(folder, tables, vocabularies)

    config: dict[str, object] = {
        **describe_tables(vocabularies),
        "tasks": list(TASKS),
        "dim": settings.dim,
        "experts": settings.experts,
        "expert": settings.expert,
        "tower": settings.tower,
        "dropout": settings.dropout,
    }
    rows = {name: labelled_rows(tables[name]) for name in ("train", "validation")}
    with deterministic(settings.threads):
        network = train(config, rows["train"], rows["validation"], settings, log)
    save_file(network.state_dict(), folder / "model.safetensors")
    architecture = Architecture(path="examples.mmoe:MMoE", config=config)
    draft = {
        "schema_version": 2,
        "name": "ml100k-mmoe",
        "version": "1",
        "signature": build_task_signature().model_dump(mode="json"),
        "network": Network(architecture=architecture).model_dump(mode="json"),
        **files,
    }
    (folder / "model.json").write_text(json.dumps(draft, indent=1) + "\n")


def labelled_rows(table: pa.Table) -> LabelledRows:
    """Convert an encoded split to tensors."""
    labels = [table[task].to_numpy().astype(np.float32) for task in TASKS]  # nulls become NaN
    return LabelledRows(convert_to_rows(table), torch.tensor(np.stack(labels, axis=1)))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    defaults = Training()
    parser = argparse.ArgumentParser(
        prog="python -m examples.movielens_tasks", description=main.__doc__
    )
    parser.add_argument("folder", type=Path, help="folder of the draft of the bundle")
    parser.add_argument(
        "--epochs", type=int, default=defaults.epochs, help="largest number of epochs"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args(argv)

    settings = Training(epochs=args.epochs, seed=args.seed)

    def write(log: Callable[[str], None]) -> None:
        write_draft(args.folder.absolute(), settings, log)

    return run_script(args.folder, write)


if __name__ == "__main__":
    sys.exit(main())
