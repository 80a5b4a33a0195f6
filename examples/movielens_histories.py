"""Train DIN or SASRec on histories of MovieLens 100K and write the draft of a bundle.

Run ``python -m examples.movielens_histories FOLDER --model din|sasrec``. A history is a list of
films that a person rated with at least 4 stars, the latest last.

- DIN predicts clicks: rows, fields and split are those of ``movielens_data.py``, and each row has
  the person's history before it.
- SASRec retrieves the next film of a person's history. The last film of every person is the test
  row and the last but one the validation row.

A draft is the folder of a bundle before it is packed.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Architecture, Signature
from compressors.metrics.full_ranking import (
    Interactions,
    RankedVectors,
    ranking_metrics,
    ranking_queries,
)
from compressors.metrics.point_estimates import auc
from examples.din import DIN
from examples.draft import run_script, write_draft
from examples.movielens import mask_ids
from examples.movielens_data import (
    FIELDS,
    UNKNOWN,
    build_vocabularies,
    build_vocabulary,
    encode,
    find_data_folder,
    read_ratings,
    split_by_time,
    take_calibration_rows,
)
from examples.sasrec import SASRec
from examples.training import deterministic, train_with_early_stopping

ModelName = Literal["din", "sasrec"]
Histories = list[list[int]]
"""The ids of each row's history, the latest last."""

LONGEST = 50
"""Number of ids of the longest history; older films are left out."""


@dataclass(frozen=True)
class Training:
    """Training settings, selected by the validation metric in a few runs.

    ``forget_user`` and ``forget_item`` are used for DIN: the shares of training rows in which this
    id is replaced by the unknown id. A row of SASRec is up to 50 films of one person.
    """

    dim: int
    dropout: float
    batch: int
    learning_rate: float
    table_l2: float
    forget_user: float = 0.2
    forget_item: float = 0.02
    epochs: int = 60
    patience: int = 3
    decay: float = 0.1
    seed: int = 1
    threads: int = 1


SETTINGS: dict[ModelName, Training] = {
    "din": Training(dim=16, dropout=0.3, batch=1024, learning_rate=1e-3, table_l2=0.05),
    # The loss stays at that of a popularity ranking for the first epochs, so the learning rate
    # must not decay.
    "sasrec": Training(
        dim=64,
        dropout=0.3,
        batch=64,
        learning_rate=1e-3,
        table_l2=0.0,
        epochs=100,
        patience=10,
        decay=1.0,
    ),
}


def pad(histories: Histories, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return padded ids int64 ``(rows, longest list)``, and a float mask that is 1 at ids."""
    length = max(1, *map(len, histories))
    ids = torch.full((len(histories), length), UNKNOWN, dtype=torch.int64)
    mask = torch.zeros(len(histories), length)
    for row, history in enumerate(histories):
        positions = slice(length - len(history), length) if left else slice(0, len(history))
        ids[row, positions] = torch.tensor(history, dtype=torch.int64)
        mask[row, positions] = 1
    return ids, mask


def to_column(histories: Histories) -> pa.Array:
    """Return histories as a column."""
    return pa.array(histories, pa.list_(pa.int64()))


# --- DIN: clicks with a history --------------------------------------------------------------


def list_earlier_clicks(frame: pd.DataFrame, item_ids: Mapping[str, int]) -> Histories:
    """Return each row's history: known films that the person clicked at earlier seconds.

    Args:
        frame: all ratings, sorted by time.
        item_ids: ids of the known films.
    """
    clicked: dict[str, list[int]] = defaultdict(list)
    histories: Histories = []
    for _, simultaneous in frame.groupby("timestamp", sort=False):
        histories += [clicked[person][-LONGEST:] for person in simultaneous["user"]]
        for person, item, click in zip(
            simultaneous["user"], simultaneous["item"], simultaneous["click"], strict=True
        ):
            if click and item in item_ids:
                clicked[person].append(item_ids[item])
    return histories


def build_click_tables() -> tuple[dict[str, pa.Table], dict[str, dict[str, int]]]:
    """Return the splits with a column ``history``, and the vocabularies."""
    frame = read_ratings(find_data_folder())
    splits = split_by_time(frame)
    vocabularies = build_vocabularies(splits["train"])
    histories = list_earlier_clicks(frame, vocabularies["item"])
    tables, start = {}, 0
    for split, part in splits.items():
        column = to_column(histories[start : start + len(part)])
        tables[split] = encode(part, vocabularies).append_column("history", column)
        start += len(part)
    return tables, vocabularies


def train_din(
    config: Mapping[str, object],
    tables: Mapping[str, pa.Table],
    settings: Training,
    log: Callable[[str], None],
) -> DIN:
    """Train DIN and return it with the weights of its best epoch, by validation AUC."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = DIN(**config)  # type: ignore[arg-type]  # plain JSON, checked by DIN itself
    shares = {"user": settings.forget_user, "item": settings.forget_item}

    def columns(split: str) -> tuple[dict[str, Tensor], Histories, Tensor]:
        table = tables[split]
        ids = {name: torch.tensor(table[name].to_numpy()) for name in FIELDS}
        clicks = torch.tensor(table["click"].to_numpy(), dtype=torch.float32)
        return ids, table["history"].to_pylist(), clicks

    def take(ids: Mapping[str, Tensor], histories: Histories, rows: Tensor) -> dict[str, Tensor]:
        history, mask = pad([histories[row] for row in rows.tolist()], left=False)
        fields = {name: values[rows] for name, values in ids.items()}
        return {**fields, "history": history, "history_mask": mask}

    ids, histories, clicks = columns("train")
    validation_ids, validation_histories, validation_clicks = columns("validation")

    def compute_loss(rows: Tensor) -> Tensor:
        logits = network(**mask_ids(take(ids, histories, rows), shares, generator))
        return F.binary_cross_entropy_with_logits(logits, clicks[rows])

    @torch.no_grad()
    def validation_auc() -> float:
        parts = torch.split(torch.arange(len(validation_clicks)), 2048)
        scores = [network(**take(validation_ids, validation_histories, rows)) for rows in parts]
        return auc(validation_clicks.numpy(), torch.cat(scores).numpy())

    train_with_early_stopping(
        network,
        len(clicks),
        compute_loss,
        validation_auc,
        settings,
        generator,
        log,
        decay=settings.decay,
    )
    return network


def build_din_signature() -> Signature:
    """Return the signature of DIN."""
    unknown_ids = {"out_of_range": "default_row", "default_row": UNKNOWN}
    ids = [
        {"kind": "id", "name": name, "table": f"tables.{name}", **unknown_ids} for name in FIELDS
    ]
    history = {
        "kind": "sequence",
        "name": "history",
        "shape": [LONGEST],
        "table": "tables.item",
        "min_length": 0,
        "mask": "history_mask",
    }
    click = {"name": "score", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}
    return Signature.model_validate(
        {
            "inputs": [*ids, history | unknown_ids],
            "outputs": [click],
            "group": "person",
            "time": "timestamp",
        }
    )


def write_din(folder: Path, settings: Training, log: Callable[[str], None]) -> None:
    """Train DIN and write its draft."""
    tables, vocabularies = build_click_tables()
    tables["calibration"] = take_calibration_rows(tables["train"], settings.seed)
    fields = [{"name": name, "rows": len(vocabularies[name]) + 1} for name in FIELDS]
    config = {"fields": fields, "dim": settings.dim, "dropout": settings.dropout}
    with deterministic(settings.threads):
        network = train_din(config, tables, settings, log)
    write_draft(
        folder,
        name="ml100k-din",
        architecture=Architecture(path="examples.din:DIN", config=config),
        network=network,
        signature=build_din_signature(),
        splits=tables,
    )


# --- SASRec: the next film of a history ------------------------------------------------------


def list_clicks_of_people(frame: pd.DataFrame) -> tuple[list[list[int]], int]:
    """Return the clicked films of each person with at least 3, in their order, and the table rows.

    Ids start at 1, because id 0 is padding.
    """
    clicked = frame[frame["click"] == 1]
    ids = build_vocabulary(clicked["item"])
    sequences = [
        [ids[item] for item in items] for _, items in clicked.groupby("user", sort=True)["item"]
    ]
    return [sequence for sequence in sequences if len(sequence) >= 3], len(ids) + 1


def build_next_film_rows(sequences: Iterable[list[int]], split: str) -> pa.Table:
    """Return a split's rows: a person, the next film, and the history before it."""
    people, films, histories = [], [], []
    for person, sequence in enumerate(sequences):
        end = len(sequence)
        # Training starts at position 1: the first film has no history.
        positions = {"train": range(1, end - 2), "validation": [end - 2], "test": [end - 1]}[split]
        for position in positions:
            people.append(person)
            films.append(sequence[position])
            histories.append(sequence[max(0, position - LONGEST) : position])
    return pa.table(
        {"person": pa.array(people), "item": pa.array(films), "history": to_column(histories)}
    )


def train_sasrec(
    config: Mapping[str, object],
    sequences: Sequence[list[int]],
    settings: Training,
    log: Callable[[str], None],
) -> SASRec:
    """Train SASRec and return it with the weights of its best epoch, by validation NDCG@10."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = SASRec(**config)  # type: ignore[arg-type]  # plain JSON, checked by SASRec itself
    # The last two films of a person are for validation and test. Each film of a part but the first
    # is predicted from those before it.
    parts = [
        training[start : start + LONGEST + 1]
        for training in (sequence[:-2] for sequence in sequences)
        for start in range(0, max(1, len(training) - 1), LONGEST)
    ]
    parts = [part for part in parts if len(part) > 1]
    validation = build_next_film_rows(sequences, "validation")
    person, item = (validation[name].to_numpy() for name in ("person", "item"))
    seen = build_next_film_rows(sequences, "train")
    films = np.arange(1, config["items"])  # type: ignore[call-overload]  # an int
    queries = ranking_queries(
        Interactions(person, item, np.ones(len(person))),
        [Interactions(seen["person"].to_numpy(), seen["item"].to_numpy(), np.ones(len(seen)))],
        films,
    )
    histories: Histories = validation["history"].to_pylist()

    def compute_loss(rows: Tensor) -> Tensor:
        batch = [parts[row] for row in rows.tolist()]
        history, mask = pad([part[:-1] for part in batch], left=True)
        target, _ = pad([part[1:] for part in batch], left=True)
        vectors = network.query.compute_all_vectors(history, mask.long())[
            mask == 1
        ]  # (positions, dim)
        logits = vectors @ network.item.table.weight.T  # (positions, items)
        return F.cross_entropy(logits, target[mask == 1])

    @torch.no_grad()
    def validation_ndcg() -> float:
        # A person's number is the number of the person's only validation row.
        history, mask = pad([histories[row] for row in queries.query], left=True)
        query = network.query(history, mask.long())
        ranked = RankedVectors(
            query.numpy(), network.item(torch.from_numpy(films)).numpy(), queries
        )
        return float(ranking_metrics(ranked, ("ndcg@10",))["ndcg@10"].mean())

    train_with_early_stopping(
        network,
        len(parts),
        compute_loss,
        validation_ndcg,
        settings,
        generator,
        log,
        decay=settings.decay,
    )
    return network


def build_sasrec_signature() -> Signature:
    """Return the signature of SASRec."""
    history = {
        "kind": "sequence",
        "name": "history",
        "shape": [LONGEST],
        "table": "query.table",
        "padding": "left",
        "mask": "history_mask",
        "mask_dtype": "int64",
    }
    return Signature.model_validate(
        {
            # Both towers use one table, which is named by its path in the query tower.
            "inputs": [history, {"kind": "id", "name": "item", "table": "query.table"}],
            "outputs": [
                {"name": "score", "kind": "retrieval", "form": "score", "metric": "ndcg@10"}
            ],
            "group": "person",
            "item": "item",
            "towers": {
                "query": {"module": "query", "inputs": ["history"]},
                "item": {"module": "item", "inputs": ["item"]},
            },
        }
    )


def write_sasrec(folder: Path, settings: Training, log: Callable[[str], None]) -> None:
    """Train SASRec and write its draft."""
    sequences, rows = list_clicks_of_people(read_ratings(find_data_folder()))
    config: dict[str, object] = {
        "items": rows,
        "longest": LONGEST,
        "dim": settings.dim,
        "dropout": settings.dropout,
    }
    with deterministic(settings.threads):
        network = train_sasrec(config, sequences, settings, log)
    tables = {
        split: build_next_film_rows(sequences, split) for split in ("train", "validation", "test")
    }
    tables["calibration"] = take_calibration_rows(tables["train"], settings.seed)
    tables["items"] = pa.table({"item": pa.array(np.arange(1, rows))})
    write_draft(
        folder,
        name="ml100k-sasrec",
        architecture=Architecture(path="examples.sasrec:SASRec", config=config),
        network=network,
        signature=build_sasrec_signature(),
        splits=tables,
        ties={"item.table.weight": "query.table.weight"},
    )


WRITE: dict[ModelName, Callable[[Path, Training, Callable[[str], None]], None]] = {
    "din": write_din,
    "sasrec": write_sasrec,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.movielens_histories", description=main.__doc__
    )
    parser.add_argument("folder", type=Path, help="folder of the draft of the bundle")
    parser.add_argument("--model", choices=get_args(ModelName), default="din")
    parser.add_argument("--epochs", type=int, default=None, help="largest number of epochs")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    settings = replace(SETTINGS[args.model], seed=args.seed)
    if args.epochs is not None:
        settings = replace(settings, epochs=args.epochs)
    folder = args.folder.absolute()
    return run_script(args.folder, lambda log: WRITE[args.model](folder, settings, log))


if __name__ == "__main__":
    sys.exit(main())
