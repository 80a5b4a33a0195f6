"""Write the drafts of the stored home: a click model, a ranking model and a retrieval model.

A draft is a folder from which a bundle is packed. All data is generated from a seed. Labels follow
the network's scores, so the original network is close to optimal and steps that train have a signal
to learn from. A home is the folder with everything that recpress stores (``RECPRESS_HOME``).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.stored_home.networks import ClickNet, TwoTowerNet

MODULE = "tests.stored_home.networks"
MAX_BAG = 4  # largest number of tags in a list
DENSE = 3  # width of the dense input
CLICK_CONFIG = {
    "users": 320,
    "items": 120,
    "tags": 40,
    "dense": DENSE,
    "dim": 16,
    "hidden": 32,
    "inner": 16,
    "blocks": 2,
}
EQUAL_USERS = 20
"""The table rows of the last 20 users equal those of the first 20, so that rows can be merged."""
TOWER_CONFIG = {"users": 60, "items": 80, "tags": 24, "dense": DENSE, "dim": 16, "hidden": 24}
ROWS = {"train": 480, "calibration": 160, "validation": 240, "test": 480}
PER_QUERY = 12  # rows of each query of the ranking model
INTERACTIONS = {"train": 4, "validation": 2, "test": 3}
"""Interactions per user of the retrieval model, by split."""
SPREAD = 1.2
"""Standard deviation of the logits."""


def write_click_draft(folder: Path, *, name: str = "clicks", ranking: bool = False) -> Path:
    """Write the draft of a click model, or of a ranking model with grades; return the folder."""
    seed = int(ranking)  # each model has its own seed; that of the retrieval model is 2
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = ClickNet(**CLICK_CONFIG).eval()
    columns = {split: _draw_rows(count, rng) for split, count in ROWS.items()}
    with torch.no_grad():
        model.user.weight[-EQUAL_USERS:] = model.user.weight[:EQUAL_USERS]
        nn.init.uniform_(model.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
        logits = _logits(model, columns["train"])
        model.out.weight *= SPREAD / logits.std()
    start = 0
    for split, table in columns.items():
        with torch.no_grad():
            logits = _logits(model, table).numpy()
        probability = 1 / (1 + np.exp(-logits))
        rows = np.arange(probability.size)
        if ranking:  # grades 0 to 3
            grade = np.clip(np.round(2 * probability + rng.normal(0, 0.5, rows.size)), 0, 3)
            table["label"] = pa.array(grade.astype(np.int64))
            table["query"] = pa.array(start // PER_QUERY + rows // PER_QUERY)
        else:
            table["label"] = pa.array((rng.random(rows.size) < probability).astype(np.int64))
        table["at"] = pa.array(start + rows)
        start += rows.size
        _write(table, folder / f"{split}.parquet")
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "items.json").write_text(json.dumps([f"i{n}" for n in range(CLICK_CONFIG["items"])]))
    document = {
        "schema_version": 2,
        "name": name,
        "version": "1",
        "signature": _click_signature(ranking=ranking),
        "network": {"architecture": {"path": f"{MODULE}:ClickNet", "config": CLICK_CONFIG}},
        "data": {split: f"{split}.parquet" for split in ROWS},
        "vocabularies": {"item": "items.json"},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder


def write_retrieval_draft(folder: Path, *, name: str = "finder") -> Path:
    """Write the draft of a two-tower model whose towers share a bag of tags; return the folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(2)
    rng = np.random.default_rng(2)
    model = TwoTowerNet(**TOWER_CONFIG).eval()
    users, items = TOWER_CONFIG["users"], TOWER_CONFIG["items"]
    recent = _bags(users, TOWER_CONFIG["tags"], rng)
    ids = rng.permutation(items)
    catalogue = {"item": pa.array(ids), "tags": _bags(items, TOWER_CONFIG["tags"], rng)}
    catalogue |= _dense(items, rng)
    _write(catalogue, folder / "items.parquet")
    with torch.no_grad():
        query = model.query(torch.arange(users), *_flat(recent))
        vectors = model.catalogue(torch.tensor(ids), *_flat(catalogue["tags"]), _matrix(catalogue))
        scores = (query @ vectors.T).numpy()
    # The largest scores plus Gumbel noise are a sample without replacement.
    noise = rng.gumbel(size=scores.shape)
    ranked_items = np.argsort(-(scores * SPREAD / scores.std() + noise), axis=1)  # (users, items)
    start = 0
    for split, count in INTERACTIONS.items():
        selected = ranked_items[:, start : start + count].reshape(-1)
        start += count
        user = np.repeat(np.arange(users), count)
        columns = {
            "user": pa.array(user),
            "recent": recent.take(pa.array(user)),
            "item": pa.array(ids[selected]),
        }
        _write(columns, folder / f"{split}.parquet")
    ties = {"query.recent.weight": "catalogue.tags.weight"}
    weights = {key: value for key, value in model.state_dict().items() if key not in ties}
    save_file(weights, folder / "model.safetensors")
    architecture = {"path": f"{MODULE}:TwoTowerNet", "config": TOWER_CONFIG}
    document = {
        "schema_version": 2,
        "name": name,
        "version": "1",
        "signature": _retrieval_signature(),
        "network": {"architecture": architecture, "ties": ties},
        "data": {split: f"{split}.parquet" for split in (*INTERACTIONS, "items")},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder


def scored_inputs(name: str) -> dict[str, Tensor]:
    """Return fixed inputs for scoring the bundles of one model, by argument name.

    Args:
        name: ``clicks``, ``ranker`` or ``finder``.
    """
    rng = np.random.default_rng(9)
    rows = 24
    if name != "finder":
        columns = _draw_rows(rows, rng)
        return _arguments(columns)
    users, items, tags = (TOWER_CONFIG[key] for key in ("users", "items", "tags"))
    recent, recent_offsets = _flat(_bags(rows, tags, rng))
    item_tags, offsets = _flat(_bags(rows, tags, rng))
    return {
        "user": torch.tensor(rng.integers(0, users, rows)),
        "recent": recent,
        "recent_offsets": recent_offsets,
        "item": torch.tensor(rng.integers(0, items, rows)),
        "tags": item_tags,
        "tags_offsets": offsets,
        "dense": _matrix(_dense(rows, rng)),
    }


def _click_signature(*, ranking: bool) -> dict[str, Any]:
    """Return the signature of the click model or of the ranking model."""
    return {
        "inputs": [
            {"kind": "id", "name": "user", "table": "user"},
            {
                "kind": "id",
                "name": "item",
                "table": "item",
                "out_of_range": "default_row",
                "default_row": 0,
            },
            {"kind": "jagged_bag", "name": "tags", "table": "tags", "shape": [MAX_BAG]},
            _dense_input(),
        ],
        "outputs": [
            {
                "name": "label",
                "kind": "ranking" if ranking else "ctr",
                "form": "score" if ranking else "logit",
                "label": "label",
                "metric": "ndcg@10" if ranking else "auc",
            }
        ],
        "group": "query" if ranking else None,
        "time": "at",
    }


def _retrieval_signature() -> dict[str, Any]:
    """Return the signature of the two-tower model."""
    return {
        "inputs": [
            {"kind": "id", "name": "user", "table": "query.user"},
            {
                "kind": "jagged_bag",
                "name": "recent",
                "table": "catalogue.tags",
                "shape": [MAX_BAG],
            },
            {"kind": "id", "name": "item", "table": "catalogue.item"},
            {"kind": "jagged_bag", "name": "tags", "table": "catalogue.tags", "shape": [MAX_BAG]},
            _dense_input(),
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
        "group": "user",
        "item": "item",
        "towers": {
            "query": {"module": "query", "inputs": ["user", "recent"]},
            "item": {"module": "catalogue", "inputs": ["item", "tags", "dense"]},
        },
    }


def _dense_input() -> dict[str, Any]:
    """Return the dense input of a signature."""
    columns = [f"d{index}" for index in range(DENSE)]
    return {"kind": "dense", "name": "dense", "columns": columns, "shape": [DENSE]}


def _draw_rows(count: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Draw the input columns of ``count`` rows of the click and the ranking model."""
    # Skewed lookups as in real logs: a few ids have most of the lookups.
    users, items = CLICK_CONFIG["users"], CLICK_CONFIG["items"]
    return {
        "user": pa.array((users * rng.random(count) ** 2).astype(np.int64)),
        "item": pa.array((items * rng.random(count) ** 2).astype(np.int64)),
        "tags": _bags(count, CLICK_CONFIG["tags"], rng),
        **_dense(count, rng),
    }


def _bags(count: int, tags: int, rng: np.random.Generator) -> pa.Array:
    """Draw ``count`` lists of at most ``MAX_BAG`` tags."""
    lengths = rng.integers(0, MAX_BAG + 1, count)
    bags = [rng.integers(0, tags, length).tolist() for length in lengths]
    return pa.array(bags, pa.list_(pa.int64()))


def _dense(count: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Draw the columns of the dense input for ``count`` rows."""
    # Multiples of 0.5 are exact in float32 and keep the files small.
    numbers: NDArray[np.float32] = np.round(2 * rng.normal(size=(DENSE, count))).astype(np.float32)
    return {f"d{index}": pa.array(row / 2) for index, row in enumerate(numbers)}


def _matrix(columns: dict[str, pa.Array]) -> Tensor:
    """Return the columns of the dense input as float32 ``(rows, DENSE)``."""
    rows = [columns[f"d{index}"].to_numpy() for index in range(DENSE)]
    return torch.tensor(np.stack(rows, axis=1), dtype=torch.float32)


def _flat(bags: pa.Array) -> tuple[Tensor, Tensor]:
    """Return the values of a list column, int64 ``(values,)``, and offsets, int64 ``(rows,)``."""
    lists = bags.to_pylist()
    lengths = torch.tensor([len(ids) for ids in lists])
    values = torch.tensor([number for ids in lists for number in ids], dtype=torch.int64)
    return values, lengths.cumsum(0) - lengths


def _arguments(columns: dict[str, pa.Array]) -> dict[str, Tensor]:
    """Convert columns to the arguments of ``ClickNet.forward``."""
    tags, offsets = _flat(columns["tags"])
    return {
        "user": torch.tensor(columns["user"].to_numpy()),
        "item": torch.tensor(columns["item"].to_numpy()),
        "tags": tags,
        "tags_offsets": offsets,
        "dense": _matrix(columns),
    }


def _logits(model: ClickNet, columns: dict[str, pa.Array]) -> Tensor:
    """Compute the logits of a model, float32 ``(rows,)``."""
    logits: Tensor = model(**_arguments(columns))
    return logits


def _write(columns: dict[str, pa.Array], path: Path) -> None:
    """Write columns as a parquet file."""
    # Uncompressed, because the whole fixture is compressed.
    pq.write_table(pa.table(columns), path, compression="none")
