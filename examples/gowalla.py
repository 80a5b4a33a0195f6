"""Train a two-tower model on Gowalla check-ins and write data and model as the draft of a bundle.

Run ``python -m examples.gowalla DRAFT --data FOLDER``. The folder contains the split that
LightGCN's authors published and most papers use: ``train.txt`` and ``test.txt``, plain or ``.gz``,
with one user and their items per line. If the folder has a ``valid.txt`` that was taken from the
public training file, its rows are added back. ``docs/results/gowalla.md`` describes the origin of
the data and the results.

Validation rows are drawn from the public training file with a seed. No choice uses the test file.

A draft is the folder that becomes a bundle when it is packed.
"""

import gzip
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from compressors.contracts import Architecture, Network, Signature
from compressors.metrics.full_ranking import (
    Interactions,
    RankedVectors,
    ranking_metrics,
    ranking_queries,
)
from examples.draft import CALIBRATION_ROWS, create_parser, run_script
from examples.public_data import DataMissing, find_data_folder
from examples.two_tower import Ints, Training, TwoTower, compute_vectors, train

USERS, ITEMS = 29_858, 40_981
PAIR_HASHES = {  # SHA-256 of the sorted pairs as int64; the published results refer to this data
    "train": "d453bfc18e5613d6310ab05f7ebc1c6c724ee913dc31c769d1c8743c678d27f7",
    "test": "dac9527045e35230c82e4a5c54715b5e60f8a7bbe935ffdb4ee2ebe21c32ddb7",
}
VALIDATION_SHARE = 0.1  # of the public training rows
VALIDATION_USERS = 5000  # users for whom recall is measured after every epoch
REMEDY = "Put train.txt and test.txt of LightGCN's published split into a folder."


@dataclass(frozen=True)
class Splits:
    """Pairs of user and item, int64 ``(rows, 2)`` per split."""

    train: Ints
    validation: Ints
    test: Ints


# --- data ------------------------------------------------------------------------------------


def read_pairs(folder: Path, part: str) -> Ints:
    """Read the sorted pairs of user and item of one public file, int64 ``(rows, 2)``.

    Raises:
        DataMissing: the file does not exist, or contains other pairs.
    """
    names = ["train", "valid"] if part == "train" else [part]
    lines = [pairs for name in names for pairs in _read_lines(folder, name)]
    if not lines:
        raise DataMissing(
            f"Expected {part}.txt or {part}.txt.gz in {folder}, got neither. Copy the file of "
            f"LightGCN's published split there."
        )
    pairs = np.unique(np.concatenate(lines), axis=0)
    digest = hashlib.sha256(pairs.astype("<i8").tobytes()).hexdigest()
    if digest != PAIR_HASHES[part]:
        raise DataMissing(
            f"Expected the {part} pairs of the public split in {folder}, with SHA-256 "
            f"{PAIR_HASHES[part]}, got {len(pairs):,} pairs with SHA-256 {digest}. Download them "
            f"again."
        )
    return pairs


def _read_lines(folder: Path, name: str) -> Iterator[Ints]:
    """Yield the pairs of each line, int64 ``(items, 2)``; none if the file does not exist."""
    for path in (folder / f"{name}.txt", folder / f"{name}.txt.gz"):
        if not path.is_file():
            continue
        raw = path.read_bytes()
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        for line in text.splitlines():
            user, *items = map(int, line.split())
            if items:
                yield np.stack([np.full(len(items), user), np.array(items)], axis=1)
        return


def split(folder: Path, seed: int) -> Splits:
    """Read the public pairs, and split the public training pairs into training and validation.

    Every user keeps at least one training row.
    """
    public, test = read_pairs(folder, "train"), read_pairs(folder, "test")
    rng = np.random.default_rng(seed)
    permutation = rng.permutation(len(public))
    # Positions in the shuffled rows; the first row of each user always stays in training.
    _, first_of_user = np.unique(public[permutation, 0], return_index=True)
    candidates = np.setdiff1d(np.arange(len(public)), first_of_user)
    is_validation = np.zeros(len(public), bool)
    is_validation[
        permutation[rng.choice(candidates, int(VALIDATION_SHARE * len(public)), replace=False)]
    ] = True
    return Splits(public[~is_validation], public[is_validation], test)


# --- training --------------------------------------------------------------------------------


def to_interactions(pairs: Ints) -> Interactions:
    """Convert pairs to interactions with relevance 1."""
    return Interactions(pairs[:, 0], pairs[:, 1], np.ones(len(pairs)))


def build_recall_measure(relevant: Ints, *seen: Ints) -> Callable[[TwoTower], tuple[float, float]]:
    """Return a function that computes Recall@20 and NDCG@20 of a network.

    Args:
        relevant: validation or test pairs, whose items count as relevant for their users.
        seen: earlier pairs; a user's items in them are excluded from the user's ranking.
    """
    queries = ranking_queries(
        to_interactions(relevant), map(to_interactions, seen), np.arange(ITEMS)
    )

    def measure(network: TwoTower) -> tuple[float, float]:
        query, item = compute_vectors(network, {"user": torch.from_numpy(queries.query)})
        ranked = RankedVectors(query.numpy(), item.numpy(), queries)
        values = ranking_metrics(ranked, ("recall@20", "ndcg@20"))
        return float(values["recall@20"].mean()), float(values["ndcg@20"].mean())

    return measure


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch threads within the ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_network(settings: Training) -> TwoTower:
    """Return an untrained network whose weights are drawn with the seed of the settings."""
    torch.manual_seed(settings.seed)
    return TwoTower(**build_architecture(settings).config)


def fit(
    splits: Splits, settings: Training, *, train_on_validation: bool, log: Callable[[str], None]
) -> tuple[TwoTower, int, float]:
    """Train a network; return it, its best epoch, and the validation Recall@20 of that epoch.

    With ``train_on_validation``, validation rows only select the number of epochs. A second network
    is then trained for that many epochs on training and validation rows together, which are all
    public training rows.
    """
    # A subset of users, because recall is measured after every epoch.
    users = np.random.default_rng(settings.seed).permutation(USERS)[:VALIDATION_USERS]
    measure = build_recall_measure(
        splits.validation[np.isin(splits.validation[:, 0], users)], splits.train
    )
    network = build_network(settings)
    epoch, recall = train(network, splits.train, settings, lambda net: measure(net)[0], log)
    if train_on_validation:
        network = build_network(settings)
        both = np.concatenate([splits.train, splits.validation])
        train(network, both, replace(settings, stop_after=epoch), None, log)
    return network, epoch, recall


# --- the draft of a bundle -------------------------------------------------------------------


def build_signature() -> Signature:
    """Return the signature of the network: inputs, output, towers, group and metric."""
    return Signature.model_validate(
        {
            "inputs": [
                {"kind": "id", "name": "user", "table": "query.table"},
                {"kind": "id", "name": "item", "table": "item.table"},
            ],
            "outputs": [
                {"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}
            ],
            "group": "user",
            "item": "item",
            "towers": {
                "query": {"module": "query", "inputs": ["user"]},
                "item": {"module": "item", "inputs": ["item"]},
            },
        }
    )


def build_architecture(settings: Training) -> Architecture:
    """Return the network as an import path and JSON arguments."""
    return Architecture(
        path="examples.two_tower:TwoTower",
        config={
            "users": USERS,
            "items": ITEMS,
            "dim": settings.dim,
            "hidden": settings.hidden,
            "temperature": settings.temperature,
        },
    )


def write_draft(
    folder: Path,
    data: Path,
    settings: Training,
    *,
    train_on_validation: bool,
    log: Callable[[str], None],
) -> dict[str, object]:
    """Read and split the data, train the network, and write the draft of a bundle.

    ``model.json`` is removed first and written last, so a folder with ``model.json`` is complete.

    Args:
        folder: folder of the draft; created if needed, files of an earlier draft are replaced.
        data: folder of the public files.
        settings: training settings.
        train_on_validation: train on the validation rows as well, after they have selected the
            number of epochs.
        log: called with each line of progress.

    Returns:
        The training record, which is also written next to the folder.

    Raises:
        DataMissing: the data is missing or differs from the public split.
    """
    started = time.monotonic()
    splits = split(data, settings.seed)
    # The rows of each parquet file of the bundle.
    tables = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    if train_on_validation:
        tables = {"train": np.concatenate([splits.train, splits.validation]), "test": splits.test}
    permutation = np.random.default_rng(settings.seed).permutation(len(tables["train"]))
    tables["calibration"] = tables["train"][np.sort(permutation[:CALIBRATION_ROWS])]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "model.json"
    manifest.unlink(missing_ok=True)
    for name, pairs in tables.items():
        columns = {"user": pa.array(pairs[:, 0]), "item": pa.array(pairs[:, 1])}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        log(f"{name}: {len(pairs):,} rows")
    pq.write_table(pa.table({"item": pa.array(np.arange(ITEMS))}), folder / "items.parquet")

    training_start = time.monotonic()
    with torch_threads(settings.threads):
        network, epoch, validation_recall = fit(
            splits, settings, train_on_validation=train_on_validation, log=log
        )
        seconds = time.monotonic() - training_start
        recall, ndcg = build_recall_measure(splits.test, splits.train, splits.validation)(network)
    log(
        f"epoch {epoch}: validation Recall@20 {validation_recall:.4f}; test Recall@20 "
        f"{recall:.4f}, NDCG@20 {ndcg:.4f}; {seconds:.0f} s of training"
    )
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()},
        folder / "model.safetensors",
    )
    draft = {
        "schema_version": 2,
        "name": "gowalla-two-tower",
        "version": "1",
        "signature": build_signature().model_dump(mode="json"),
        "network": Network(architecture=build_architecture(settings)).model_dump(mode="json"),
        "data": {name: f"{name}.parquet" for name in (*tables, "items")},
    }
    record: dict[str, object] = {
        "recipe": asdict(settings),  # training settings; no compression recipe
        "train_on_validation": train_on_validation,
        "data": {"sha256": PAIR_HASHES},
        "torch": torch.__version__,
        "epoch": epoch,
        "validation_recall@20": validation_recall,
        "test_recall@20": recall,
        "test_ndcg@20": ndcg,
        "training_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    # Next to the folder, not in it: a bundle contains only files that its manifest names.
    folder.with_name(f"{folder.name}.training.json").write_text(json.dumps(record, indent=1) + "\n")
    manifest.write_text(json.dumps(draft, indent=1) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    parser = create_parser("examples.gowalla", main.__doc__)
    parser.add_argument(
        "--train-on-validation",
        action="store_true",
        help="train on the validation rows as well, after they have selected the number of epochs",
    )
    args = parser.parse_args(argv)
    settings = Training(seed=args.seed)
    if args.epochs is not None:
        settings = replace(settings, epochs=args.epochs)

    def write(log: Callable[[str], None]) -> None:
        data = find_data_folder(args.data, "gowalla", REMEDY)
        write_draft(
            args.folder.absolute(),
            data,
            settings,
            train_on_validation=args.train_on_validation,
            log=log,
        )

    return run_script(args.folder, write)


if __name__ == "__main__":
    sys.exit(main())
