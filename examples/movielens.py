"""Train DCN-v2 on MovieLens 100K and write data and model as the draft of a bundle.

Run ``python -m examples.movielens FOLDER``. The data files are read from the installed wheel
``recbole==1.2.1``; no code of that package runs. ``docs/results/movielens.md`` describes the origin
and license of the data, and the split.

A rating of 4 or more counts as a click. Rows are split by time, so most users in the test set are
not in the training data. A vocabulary maps the tokens of a field in the training data to ids from
1; id 0 means any other token.
"""

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Architecture, Network, Signature
from compressors.metrics.point_estimates import auc
from examples.dcnv2 import DCNv2

PACKAGE = "recbole"
VERSION = "1.2.1"
FILES = {  # SHA-256; the published results refer to these files
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
FIELDS = ("user", "item", "age", "gender", "occupation", "zip", "year", "hour")
BAG = "genres"
LONGEST_BAG = 8  # padded length of a film's list of genres; the longest list has 6
CLICK_FROM = 4  # stars
TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.1  # of all rows; the remaining rows are the test set
CALIBRATION_ROWS = 4096
UNKNOWN = 0  # id of tokens that are not in training data


class DataMissing(Exception):
    """The demo's data is not installed, or differs from the data of the published results."""


@dataclass(frozen=True)
class Training:
    """Training settings, selected by validation AUC; the test set was not used."""

    dim: int = 16
    cross_layers: int = 2
    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.3
    batch_norm: bool = False
    batch: int = 1024
    learning_rate: float = 1e-3
    # Coefficient of the penalty table_l2 / 2 * ||table||^2, which is added to the loss of every
    # batch for all rows of all tables. Without it the model memorizes the few training rows.
    table_l2: float = 0.05
    # Shares of training rows in which the id of the user, or of the film, is replaced by the
    # unknown id. Most users and some films of the test set are unknown, so the table row of the
    # unknown id must be trained.
    forget_user: float = 0.2
    forget_item: float = 0.02
    epochs: int = 40
    patience: int = 3
    seed: int = 1
    # The number of threads changes the order of float sums, and thereby the last digits. One
    # thread is also the fastest: the layers are too small to parallelize.
    threads: int = 1


@dataclass(frozen=True)
class Rows:
    """Model inputs and clicks of one split.

    ``ids`` is int64 ``(rows,)`` per field, ``bags`` int64 ``(rows, longest)`` padded at the end,
    ``lengths`` int64 ``(rows,)``, ``clicks`` float32 ``(rows,)``.
    """

    ids: dict[str, Tensor]
    bags: Tensor
    lengths: Tensor
    clicks: Tensor

    def __len__(self) -> int:
        return len(self.clicks)

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the network's arguments for the rows with these indices, int64 ``(batch,)``."""
        lengths = self.lengths[rows]  # (batch,)
        filled = torch.arange(self.bags.shape[1]) < lengths[:, None]  # (batch, longest)
        arguments = {name: ids[rows] for name, ids in self.ids.items()}  # (batch,) each
        arguments[BAG] = self.bags[rows][filled]  # (all ids,)
        arguments[f"{BAG}_offsets"] = lengths.cumsum(0) - lengths  # (batch,)
        return arguments


# --- data ------------------------------------------------------------------------------------


def data_folder() -> Path:
    """Return the folder of the wheel's copy of MovieLens 100K.

    Raises:
        DataMissing: the wheel is not installed, has another version, or its files were changed.
    """
    remedy = f"Run `pip install --no-deps {PACKAGE}=={VERSION}`."
    try:
        wheel = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise DataMissing(
            f"The demo reads MovieLens 100K from {PACKAGE}, which is not installed. {remedy}"
        ) from error
    if wheel.version != VERSION:
        raise DataMissing(f"Expected {PACKAGE} {VERSION}, got {wheel.version}. {remedy}")
    folder = Path(str(wheel.locate_file(f"{PACKAGE}/dataset_example/ml-100k")))
    for name, expected in FILES.items():
        path = folder / name
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if digest != expected:
            raise DataMissing(
                f"Expected {path} with SHA-256 {expected}, got {digest}. Reinstall it: {remedy}"
            )
    return folder


def read_ratings(folder: Path) -> pd.DataFrame:
    """Read all ratings, sorted by time: one row each, fields as strings, ``genres`` as lists.

    A release year that is not a number becomes an empty string; the genre "unknown" is omitted.
    """

    def table(name: str) -> pd.DataFrame:
        frame = pd.read_csv(folder / name, sep="\t", dtype=str, keep_default_na=False)
        return frame.rename(columns=lambda column: column.partition(":")[0])

    ratings = table("ml-100k.inter").merge(table("ml-100k.user"), on="user_id", validate="m:1")
    ratings = ratings.merge(table("ml-100k.item"), on="item_id", validate="m:1")
    seconds = ratings["timestamp"].astype(float).astype("int64")
    year = ratings["release_year"]
    frame = pd.DataFrame(
        {
            "user": ratings["user_id"],
            "item": ratings["item_id"],
            "age": ratings["age"],
            "gender": ratings["gender"],
            "occupation": ratings["occupation"],
            "zip": ratings["zip_code"].str[:3],  # the region; full codes nearly identify users
            "year": year.where(year.str.fullmatch(r"\d{4}"), ""),
            "hour": (seconds // 3600 % 24).astype(str),  # UTC
            "genres": [
                [genre for genre in genres.split() if genre != "unknown"]
                for genres in ratings["class"]
            ],
            "stars": ratings["rating"].astype(float).astype("int64"),
            "click": (ratings["rating"].astype(float) >= CLICK_FROM).astype("int64"),
            "timestamp": seconds,
        }
    )
    # Equal timestamps are common (users rate pages of films at once); ids break the ties.
    frame = frame.assign(u=frame["user"].astype(int), i=frame["item"].astype(int))
    frame = frame.sort_values(["timestamp", "u", "i"], ignore_index=True)
    return frame.drop(columns=["u", "i"])


def split_by_time(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split rows into training, validation and test; each split is later than the previous one.

    A boundary within one second moves to the end of that second.
    """
    seconds = frame["timestamp"].to_numpy()

    def boundary(share: float) -> int:
        last = seconds[int(share * len(frame)) - 1]
        return int(np.searchsorted(seconds, last, side="right"))

    train_end, validation_end = boundary(TRAIN_SHARE), boundary(TRAIN_SHARE + VALIDATION_SHARE)
    return {
        "train": frame.iloc[:train_end].reset_index(drop=True),
        "validation": frame.iloc[train_end:validation_end].reset_index(drop=True),
        "test": frame.iloc[validation_end:].reset_index(drop=True),
    }


def vocabulary(tokens: Iterable[str]) -> dict[str, int]:
    """Number the sorted tokens from 1; the empty token has no id, and id 0 means unknown."""
    return {token: number for number, token in enumerate(sorted(set(tokens) - {""}), start=1)}


def build_vocabularies(train: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return one vocabulary (token -> id) per field, from training rows only."""
    vocabularies = {name: vocabulary(train[name]) for name in FIELDS}
    vocabularies[BAG] = vocabulary(genre for genres in train[BAG] for genre in genres)
    return vocabularies


def encode(frame: pd.DataFrame, vocabularies: Mapping[str, Mapping[str, int]]) -> pa.Table:
    """Replace tokens by ids, in the columns that the bundle's signature names."""
    columns: dict[str, pa.Array] = {}
    for name in FIELDS:
        ids = [vocabularies[name].get(token, UNKNOWN) for token in frame[name]]
        columns[name] = pa.array(ids, pa.int64())
    bags = [[vocabularies[BAG].get(genre, UNKNOWN) for genre in genres] for genres in frame[BAG]]
    columns[BAG] = pa.array(bags, pa.list_(pa.int64()))
    columns["click"] = pa.array(frame["click"], pa.int64())
    columns["timestamp"] = pa.array(frame["timestamp"], pa.int64())
    # The group of a row. `user` cannot be the group, because all unknown users share one id there.
    columns["person"] = pa.array(frame["user"], pa.string())
    return pa.table(columns)


def convert_to_rows(table: pa.Table) -> Rows:
    """Convert an encoded split to tensors."""
    lists: list[list[int]] = table[BAG].to_pylist()
    lengths = torch.tensor([len(ids) for ids in lists])  # (rows,)
    padded = torch.zeros(len(lists), LONGEST_BAG, dtype=torch.int64)  # (rows, longest)
    filled = torch.arange(LONGEST_BAG) < lengths[:, None]  # (rows, longest)
    padded[filled] = torch.tensor([number for ids in lists for number in ids])
    return Rows(
        ids={name: torch.tensor(table[name].to_numpy()) for name in FIELDS},
        bags=padded,
        lengths=lengths,
        clicks=torch.tensor(table["click"].to_numpy(), dtype=torch.float32),
    )


# --- training --------------------------------------------------------------------------------


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Make torch deterministic within the ``with`` block, and restore its settings afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


@torch.no_grad()
def score(network: nn.Module, rows: Rows, batch: int = 8192) -> Tensor:
    """Return the logits of all rows, float ``(rows,)``; sets the network to evaluation mode."""
    network.eval()
    parts = torch.split(torch.arange(len(rows)), batch)
    return torch.cat([network(**rows.inputs(part)) for part in parts])


def mask_ids(
    inputs: dict[str, Tensor], shares: Mapping[str, float], generator: torch.Generator
) -> dict[str, Tensor]:
    """Replace a random share of each named field's ids by the unknown id."""
    masked = dict(inputs)
    for name, share in shares.items():
        is_masked = torch.rand(len(inputs[name]), generator=generator) < share  # (batch,)
        masked[name] = inputs[name].masked_fill(is_masked, UNKNOWN)
    return masked


def train(
    config: Mapping[str, object],
    rows: Rows,
    validation: Rows,
    settings: Training,
    log: Callable[[str], None],
) -> tuple[DCNv2, list[dict[str, float]]]:
    """Train a network; return it with the weights of its best epoch, and all epochs' metrics.

    The learning rate is divided by 10 after each epoch that does not improve the best validation
    AUC; training stops after ``settings.patience`` such epochs in a row.
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    network = DCNv2(**config)  # type: ignore[arg-type]  # plain JSON, checked by DCNv2 itself
    tables = [
        table.weight
        for table in network.modules()
        if isinstance(table, nn.Embedding | nn.EmbeddingBag)
    ]
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    shares = {"user": settings.forget_user, "item": settings.forget_item}
    best, state, epochs_without_gain = -1.0, network.state_dict(), 0
    epochs: list[dict[str, float]] = []
    for epoch in range(1, settings.epochs + 1):
        network.train()
        total = 0.0
        permutation = torch.randperm(len(rows), generator=generator)  # (rows,)
        for part in torch.split(permutation, settings.batch):
            logits = network(**mask_ids(rows.inputs(part), shares, generator))  # (batch,)
            loss = F.binary_cross_entropy_with_logits(logits, rows.clicks[part])
            penalty = torch.stack([weight.square().sum() for weight in tables]).sum()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss + settings.table_l2 / 2 * penalty)
            optimizer.step()
            total += loss.item() * len(part)
        valid_auc = auc(validation.clicks.numpy(), score(network, validation).numpy())
        epochs.append(
            {"epoch": epoch, "train_logloss": total / len(rows), "validation_auc": valid_auc}
        )
        loss_and_auc = f"train logloss {total / len(rows):.4f}  validation AUC {valid_auc:.4f}"
        log(f"epoch {epoch:2d}  {loss_and_auc}")
        if valid_auc > best:
            best, epochs_without_gain = valid_auc, 0
            state = copy.deepcopy(network.state_dict())
            continue
        epochs_without_gain += 1
        if epochs_without_gain == settings.patience:
            break
        for group in optimizer.param_groups:
            group["lr"] /= 10
    network.load_state_dict(state)
    return network.eval(), epochs


# --- the draft of a bundle -------------------------------------------------------------------


def signature() -> Signature:
    """Return the network's signature, with the columns of label, group and time."""
    policy = {"out_of_range": "default_row", "default_row": UNKNOWN}
    ids = [{"kind": "id", "name": name, "table": f"tables.{name}", **policy} for name in FIELDS]
    genres = {"kind": "jagged_bag", "name": BAG, "table": f"bags.{BAG}", "shape": [LONGEST_BAG]}
    click = {"name": "score", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}
    return Signature.model_validate(
        {
            "inputs": [*ids, genres | policy],
            "outputs": [click],
            "group": "person",
            "time": "timestamp",
        }
    )


def architecture(vocabularies: Mapping[str, Mapping[str, int]], settings: Training) -> Architecture:
    """Return the network as an import path and JSON arguments; tables have a row for id 0."""
    return Architecture(
        path="examples.dcnv2:DCNv2",
        config={
            "fields": [{"name": name, "rows": len(vocabularies[name]) + 1} for name in FIELDS],
            "bags": [{"name": BAG, "rows": len(vocabularies[BAG]) + 1}],
            "dim": settings.dim,
            "cross_layers": settings.cross_layers,
            "hidden": list(settings.hidden),
            "dropout": settings.dropout,
            "batch_norm": settings.batch_norm,
            "structure": "parallel",
        },
    )


def write_draft(folder: Path, settings: Training, log: Callable[[str], None]) -> dict[str, object]:
    """Read and split the data, train the network, and write the draft of a bundle.

    ``model.json`` is removed first and written last, so a folder with ``model.json`` is complete.

    Args:
        folder: folder of the draft; created if needed, files of an earlier draft are replaced.
        settings: training settings.
        log: called with each line of progress.

    Returns:
        The training record, which is also written next to the folder.

    Raises:
        DataMissing: the wheel with the data is missing, or its version or files differ.
    """
    started = time.monotonic()
    splits = split_by_time(read_ratings(data_folder()))
    vocabularies = build_vocabularies(splits["train"])
    tables = {name: encode(frame, vocabularies) for name, frame in splits.items()}
    permutation = np.random.default_rng(settings.seed).permutation(len(tables["train"]))
    tables["calibration"] = tables["train"].take(np.sort(permutation[:CALIBRATION_ROWS]))
    for name, table in tables.items():
        log(f"{name}: {len(table)} rows, {table['click'].to_numpy().mean():.1%} clicks")

    (folder / "vocabularies").mkdir(parents=True, exist_ok=True)
    manifest = folder / "model.json"
    manifest.unlink(missing_ok=True)
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    for name, ids in vocabularies.items():
        text = json.dumps({"unknown": UNKNOWN, "ids": ids}, indent=1)
        (folder / "vocabularies" / f"{name}.json").write_text(text + "\n")

    arch = architecture(vocabularies, settings)
    training_start = time.monotonic()
    rows, validation = convert_to_rows(tables["train"]), convert_to_rows(tables["validation"])
    with deterministic(settings.threads):
        network, epochs = train(arch.config, rows, validation, settings, log)
    seconds = time.monotonic() - training_start
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")

    best = max(epochs, key=lambda epoch: epoch["validation_auc"])
    log(
        f"best epoch {best['epoch']}: validation AUC {best['validation_auc']:.4f}, "
        f"{sum(weight.numel() for weight in weights.values())} weights, "
        f"{seconds:.0f} s of training"
    )
    draft = {
        "schema_version": 2,
        "name": "ml100k-dcnv2",
        "version": "1",
        "signature": signature().model_dump(mode="json"),
        "network": Network(architecture=arch).model_dump(mode="json"),
        "data": {name: f"{name}.parquet" for name in tables},
        "vocabularies": {name: f"vocabularies/{name}.json" for name in vocabularies},
        "transforms": {},  # files that map raw values to ids; none
    }
    record: dict[str, object] = {
        "recipe": asdict(settings),  # training settings; no compression recipe
        "data": {"package": f"{PACKAGE}=={VERSION}", "sha256": FILES},
        "torch": torch.__version__,
        "validation_auc": best["validation_auc"],
        "training_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "epochs": epochs,
    }
    # Next to the folder, not in it: a bundle contains only files that its manifest names.
    folder.with_name(f"{folder.name}.training.json").write_text(json.dumps(record, indent=1) + "\n")
    manifest.write_text(json.dumps(draft, indent=1) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Write the draft; progress goes to standard error. Returns 0, or 2 if the data is missing."""
    defaults = Training()
    parser = argparse.ArgumentParser(prog="python -m examples.movielens", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of the draft of the bundle")
    parser.add_argument(
        "--epochs", type=int, default=defaults.epochs, help="largest number of epochs"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args(argv)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    settings = Training(epochs=args.epochs, seed=args.seed)
    try:
        write_draft(args.folder.absolute(), settings, log)
    except DataMissing as error:
        log(str(error))
        return 2
    log(f"wrote {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
