"""Gowalla check-ins, a two-tower model trained on them, and both written as the draft of a bundle.

Run ``python -m examples.gowalla DRAFT --data FOLDER``. The folder holds the split that LightGCN's
authors published and most papers use: ``train.txt`` and ``test.txt``, plain or ``.gz``, a user and
their items a line; a ``valid.txt`` that was cut from the public training file is put back. Where it
comes from, and what was measured on it, is in ``docs/results/gowalla.md``.

Validation rows are drawn from the public training file with a seed. The test file is not looked at.
"""

import argparse
import gzip
import hashlib
import json
import os
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
from compressors.metrics.full_ranking import Interactions, ranking_queries, recall_and_ndcg
from examples.two_tower import Ints, Training, TwoTower, train, vectors

USERS, ITEMS = 29_858, 40_981
PAIRS = {  # SHA-256 of the sorted pairs as int64, which is what the measured numbers belong to
    "train": "d453bfc18e5613d6310ab05f7ebc1c6c724ee913dc31c769d1c8743c678d27f7",
    "test": "dac9527045e35230c82e4a5c54715b5e60f8a7bbe935ffdb4ee2ebe21c32ddb7",
}
VALIDATION = 0.1  # of the public training rows
CALIBRATION_ROWS = 4096
VALIDATED_USERS = 5000
VARIABLE = "RECPRESS_DATA"


class DataMissing(Exception):
    """There is no such data, or it is not the data the numbers were measured on."""


@dataclass(frozen=True)
class Splits:
    """User and item, int64 ``(rows, 2)`` each."""

    train: Ints
    validation: Ints
    test: Ints


# --- data ------------------------------------------------------------------------------------


def data_folder(given: Path | None) -> Path:
    """The folder that was named, or ``gowalla`` below what ``RECPRESS_DATA`` names.

    Raises:
        DataMissing: neither is there.
    """
    root = os.environ.get(VARIABLE)
    folder = given or (Path(root) / "gowalla" if root else None)
    if folder is None or not folder.is_dir():
        raise DataMissing(
            f"The Gowalla check-ins are not here ({folder or f'no --data and no {VARIABLE}'}). Put "
            f"train.txt and test.txt of LightGCN's published split into a folder and name it with "
            f"--data."
        )
    return folder


def read_pairs(folder: Path, part: str) -> Ints:
    """Sorted pairs of user and item of one public file, int64 ``(rows, 2)``.

    Raises:
        DataMissing: there is no such file, or it holds other pairs.
    """
    names = ["train", "valid"] if part == "train" else [part]
    found = [pairs for name in names for pairs in _lines(folder, name)]
    if not found:
        raise DataMissing(f"{folder} has neither {part}.txt nor {part}.txt.gz.")
    pairs = np.unique(np.concatenate(found), axis=0)
    digest = hashlib.sha256(pairs.astype("<i8").tobytes()).hexdigest()
    if digest != PAIRS[part]:
        raise DataMissing(
            f"{folder} holds {len(pairs):,} {part} pairs with SHA-256 {digest}; the public split's "
            f"is {PAIRS[part]}. Fetch it anew."
        )
    return pairs


def _lines(folder: Path, name: str) -> Iterator[Ints]:
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
    """The public test pairs; the public training pairs, of which some are for validation.

    A user keeps at least one training row.
    """
    known, test = read_pairs(folder, "train"), read_pairs(folder, "test")
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(known))
    _, first = np.unique(known[order, 0], return_index=True)
    may = np.setdiff1d(np.arange(len(known)), first)
    chosen = np.zeros(len(known), bool)
    chosen[order[draw.choice(may, int(VALIDATION * len(known)), replace=False)]] = True
    return Splits(known[~chosen], known[chosen], test)


# --- training --------------------------------------------------------------------------------


def interactions(pairs: Ints) -> Interactions:
    """All of them count."""
    return Interactions(pairs[:, 0], pairs[:, 1], np.ones(len(pairs)))


def measured_on(test: Ints, *seen: Ints) -> Callable[[TwoTower], tuple[float, float]]:
    """What gives Recall@20 and NDCG@20 of a network, with what users had before hidden.

    Args:
        test: what is to be found.
        seen: what is hidden from the same users.
    """
    what = ranking_queries(interactions(test), map(interactions, seen), np.arange(ITEMS))

    def measure(network: TwoTower) -> tuple[float, float]:
        query, item = vectors(network, {"user": torch.from_numpy(what.query)})
        recall, ndcg = recall_and_ndcg(query.numpy(), item.numpy(), what)
        return float(recall.mean()), float(ndcg.mean())

    return measure


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch uses this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def network_of(recipe: Training) -> TwoTower:
    """An untrained network."""
    torch.manual_seed(recipe.seed)
    return TwoTower(**architecture(recipe).config)


def fitted(
    splits: Splits, recipe: Training, *, everything: bool, say: Callable[[str], None]
) -> tuple[TwoTower, int, float]:
    """A trained network, the epoch it is of, and its validation Recall@20 at that epoch.

    With ``everything`` the epochs are found on the validation rows first, and a second network is
    then trained for as many on training and validation rows, which are all public training rows.
    """
    # Every epoch asks, so some users have to do.
    some = np.random.default_rng(recipe.seed).permutation(USERS)[:VALIDATED_USERS]
    validated = measured_on(splits.validation[np.isin(splits.validation[:, 0], some)], splits.train)
    network = network_of(recipe)
    epoch, recall = train(network, splits.train, recipe, lambda net: validated(net)[0], say)
    if everything:
        network = network_of(recipe)
        both = np.concatenate([splits.train, splits.validation])
        train(network, both, replace(recipe, stop_after=epoch), None, say)
    return network, epoch, recall


# --- the draft of a bundle -------------------------------------------------------------------


def signature() -> Signature:
    """What the network takes in, and what its data is judged by."""
    return Signature.model_validate(
        {
            "task": "retrieval",
            "inputs": [
                {"kind": "id", "name": "user", "table": "query.table"},
                {"kind": "id", "name": "item", "table": "item.table"},
            ],
            "output": "score",
            "group": "user",
            "metric": "recall@20",
            "item": "item",
            "towers": {
                "query": {"module": "query", "inputs": ["user"]},
                "item": {"module": "item", "inputs": ["item"]},
            },
        }
    )


def architecture(recipe: Training) -> Architecture:
    """The network as an import path and plain settings."""
    return Architecture(
        path="examples.two_tower:TwoTower",
        config={
            "users": USERS,
            "items": ITEMS,
            "dim": recipe.dim,
            "hidden": recipe.hidden,
            "temperature": recipe.temperature,
        },
    )


def write_draft(
    folder: Path, data: Path, recipe: Training, *, everything: bool, say: Callable[[str], None]
) -> dict[str, object]:
    """Read, split, train, and write everything a bundle is packed from.

    ``model.json`` is removed first and written last: a folder that has one is complete.

    Args:
        folder: made if needed; files of an earlier draft are replaced.
        data: where the public files lie.
        recipe: how to train.
        everything: train on the validation rows too, once they have said for how long.
        say: told one line of progress at a time.

    Returns:
        The training record that is also written beside the folder.

    Raises:
        DataMissing: the data is not there or is other data.
    """
    started = time.monotonic()
    splits = split(data, recipe.seed)
    held = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    if everything:
        held = {"train": np.concatenate([splits.train, splits.validation]), "test": splits.test}
    chosen = np.random.default_rng(recipe.seed).permutation(len(held["train"]))
    held["calibration"] = held["train"][np.sort(chosen[:CALIBRATION_ROWS])]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "model.json"
    manifest.unlink(missing_ok=True)
    for name, pairs in held.items():
        columns = {"user": pa.array(pairs[:, 0]), "item": pa.array(pairs[:, 1])}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        say(f"{name}: {len(pairs):,} rows")
    pq.write_table(pa.table({"item": pa.array(np.arange(ITEMS))}), folder / "items.parquet")

    ready = time.monotonic()
    with threads(recipe.threads):
        network, epoch, validated = fitted(splits, recipe, everything=everything, say=say)
        seconds = time.monotonic() - ready
        recall, ndcg = measured_on(splits.test, splits.train, splits.validation)(network)
    say(
        f"epoch {epoch}: validation Recall@20 {validated:.4f}; test Recall@20 {recall:.4f}, "
        f"NDCG@20 {ndcg:.4f}; {seconds:.0f} s of training"
    )
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()},
        folder / "model.safetensors",
    )
    draft = {
        "schema_version": 1,
        "name": "gowalla-two-tower",
        "version": "1",
        "signature": signature().model_dump(mode="json"),
        "network": Network(architecture=architecture(recipe)).model_dump(mode="json"),
        "data": {name: f"{name}.parquet" for name in (*held, "items")},
    }
    record: dict[str, object] = {
        "recipe": asdict(recipe),
        "everything": everything,
        "data": {"sha256": PAIRS},
        "torch": torch.__version__,
        "epoch": epoch,
        "validation_recall@20": validated,
        "test_recall@20": recall,
        "test_ndcg@20": ndcg,
        "training_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    # Beside the folder, not in it: a bundle holds no file that its manifest does not name.
    folder.with_name(f"{folder.name}.training.json").write_text(json.dumps(record, indent=1) + "\n")
    manifest.write_text(json.dumps(draft, indent=1) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    usual = Training()
    parser = argparse.ArgumentParser(prog="python -m examples.gowalla", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the draft of the bundle is written")
    parser.add_argument("--data", type=Path, help=f"the public files; else {VARIABLE}/gowalla")
    parser.add_argument("--epochs", type=int, default=usual.epochs, help="at most this many")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument(
        "--everything", action="store_true", help="then train on the validation rows as well"
    )
    chosen = parser.parse_args(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    recipe = replace(usual, epochs=chosen.epochs, seed=chosen.seed)
    try:
        data = data_folder(chosen.data)
        write_draft(chosen.folder.absolute(), data, recipe, everything=chosen.everything, say=say)
    except DataMissing as fault:
        say(str(fault))
        return 2
    say(f"wrote {chosen.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
