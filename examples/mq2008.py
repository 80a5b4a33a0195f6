"""Train a ranking perceptron on MQ2008 and write data and model as the draft of a bundle.

Run ``python -m examples.mq2008 FOLDER --data FOLDER``. The folder contains the five parts of LETOR
4.0's MQ2008 for supervised ranking, ``S1.txt`` to ``S5.txt``, plain or ``.gz``.
``docs/results/reference-models.md`` describes the data and the results. A draft is the folder of a
bundle before it is packed.
"""

import gzip
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressors.contracts import Architecture, Signature
from compressors.core.batches import Batch
from compressors.metrics.point_estimates import group_ndcg
from compressors.task_kinds.loss import hard_loss
from examples.draft import create_parser, run_script, write_draft
from examples.perceptron import build_perceptron
from examples.public_data import DataMissing, find_data_folder
from examples.training import deterministic, train_with_early_stopping

FEATURES = 46
PARTS = 5
REMEDY = "Put S1.txt to S5.txt of LETOR 4.0 MQ2008 (supervised ranking) into a folder."
COLUMNS = tuple(f"f{number}" for number in range(1, FEATURES + 1))


class RankingPerceptron(nn.Module):
    """A perceptron that scores one document of a query by its features.

    Args:
        features: width of the input.
        hidden: widths of the hidden layers.
        dropout: dropout probability of hidden activations in training.
    """

    def __init__(
        self, *, features: int = FEATURES, hidden: Sequence[int] = (256, 128), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = build_perceptron(features, hidden, dropout=dropout)
        self.head = nn.Linear(hidden[-1] if hidden else features, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores float ``(rows,)`` of features float ``(rows, features)``."""
        scores: Tensor = self.head(self.layers(features)).squeeze(1)
        return scores


@dataclass(frozen=True)
class Training:
    """Training settings, selected by the validation NDCG@10 of the first fold.

    A batch contains whole queries; ``batch`` is their number.
    """

    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.3
    batch: int = 32
    learning_rate: float = 1e-3
    table_l2: float = 0.0  # the model has no tables
    epochs: int = 40
    patience: int = 3
    seed: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Documents:
    """The documents of some queries, sorted by query.

    Attributes:
        features: float32 ``(rows, 46)``.
        relevance: 0, 1 or 2, int64 ``(rows,)``.
        query: id of the query, int64 ``(rows,)``.
    """

    features: NDArray[np.float32]
    relevance: NDArray[np.int64]
    query: NDArray[np.int64]


def read_part(folder: Path, number: int) -> Documents:
    """Read one of the five parts.

    A line is ``relevance qid:id 1:value ... 46:value #comment``.

    Raises:
        DataMissing: the file does not exist.
    """
    path = folder / f"S{number}.txt"
    if path.is_file():
        text = path.read_text()
    elif (compressed := path.with_name(f"{path.name}.gz")).is_file():
        text = gzip.decompress(compressed.read_bytes()).decode()
    else:
        raise DataMissing(f"Expected {path} or {path.name}.gz, got neither. {REMEDY}")
    fields = [line.partition("#")[0].split() for line in text.splitlines()]
    query = np.array([int(row[1].partition(":")[2]) for row in fields])
    permutation = np.argsort(query, kind="stable")
    features = [[float(value.partition(":")[2]) for value in row[2:]] for row in fields]
    return Documents(
        np.array(features, np.float32)[permutation],
        np.array([int(row[0]) for row in fields])[permutation],
        query[permutation],
    )


def read_fold(folder: Path, fold: int) -> dict[str, Documents]:
    """Return the splits of a fold, 1 to 5: three parts for training, one each for the others.

    Fold 1 trains on the parts 1, 2 and 3, validates on part 4 and tests on part 5; each later
    fold is rotated by one part, as in the official folds.
    """
    parts = [read_part(folder, (fold - 1 + index) % PARTS + 1) for index in range(PARTS)]
    return {"train": _join(parts[:3]), "validation": parts[3], "test": parts[4]}


def _join(parts: Sequence[Documents]) -> Documents:
    return Documents(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.relevance for part in parts]),
        np.concatenate([part.query for part in parts]),
    )


def build_signature() -> Signature:
    """Return the signature of the network."""
    return Signature.model_validate(
        {
            "inputs": [
                {"kind": "dense", "name": "features", "shape": [FEATURES], "columns": COLUMNS}
            ],
            "outputs": [
                {
                    "name": "score",
                    "kind": "ranking",
                    "form": "score",
                    "label": "relevance",
                    "metric": "ndcg@10",
                }
            ],
            "group": "query",
        }
    )


def build_architecture(settings: Training) -> Architecture:
    """Return the network as an import path and JSON arguments."""
    return Architecture(
        path="examples.mq2008:RankingPerceptron",
        config={
            "features": FEATURES,
            "hidden": list(settings.hidden),
            "dropout": settings.dropout,
        },
    )


def train(
    splits: Mapping[str, Documents], settings: Training, log: Callable[[str], None]
) -> RankingPerceptron:
    """Train with the listwise softmax loss; keep the epoch with the best validation NDCG@10."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = RankingPerceptron(**build_architecture(settings).config)
    documents, validation = splits["train"], splits["validation"]
    features = torch.from_numpy(documents.features)
    labels = torch.from_numpy(documents.relevance).float()
    query = torch.from_numpy(documents.query)
    _, sizes = torch.unique_consecutive(query, return_counts=True)
    rows_of_query = torch.split(torch.arange(len(query)), sizes.tolist())

    def compute_loss(queries: Tensor) -> Tensor:
        rows = torch.cat([rows_of_query[number] for number in queries.tolist()])
        batch = Batch({}, labels[rows], query[rows])
        return hard_loss(build_signature(), network(features[rows]), batch)

    @torch.no_grad()
    def validation_ndcg() -> float:
        scores = network(torch.from_numpy(validation.features)).numpy()
        return float(group_ndcg(validation.relevance, scores, validation.query, k=10).mean())

    train_with_early_stopping(
        network, len(sizes), compute_loss, validation_ndcg, settings, generator, log
    )
    return network


def to_table(documents: Documents) -> pa.Table:
    """Return the columns of a split, as the signature names them."""
    columns = dict(zip(COLUMNS, map(pa.array, documents.features.T), strict=True))
    return pa.table(
        {
            **columns,
            "relevance": pa.array(documents.relevance),
            "query": pa.array(documents.query),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    parser = create_parser("examples.mq2008", main.__doc__)
    parser.add_argument("--fold", type=int, choices=range(1, PARTS + 1), default=1)
    args = parser.parse_args(argv)
    settings = Training(seed=args.seed)
    if args.epochs is not None:
        settings = replace(settings, epochs=args.epochs)

    def write(log: Callable[[str], None]) -> None:
        splits = read_fold(find_data_folder(args.data, "mq2008", REMEDY), args.fold)
        with deterministic(settings.threads):
            network = train(splits, settings, log)
        write_draft(
            args.folder.absolute(),
            name="mq2008-perceptron",
            architecture=build_architecture(settings),
            network=network,
            signature=build_signature(),
            splits={split: to_table(documents) for split, documents in splits.items()},
        )

    return run_script(args.folder, write)


if __name__ == "__main__":
    sys.exit(main())
