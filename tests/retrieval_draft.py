"""Write a small draft of a retrieval model, with interactions drawn from the network's scores.

The network is thus "planted" in the data: no other network fits the data better, and compression
can only lower the quality.

A draft is a folder from which a bundle is packed. The input ``lately`` is the tags of a user's
recent purchases.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from draft_network import TowerNet
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

# DENSE is the width of the dense input, and LONGEST the largest number of tags in a list.
USERS, ITEMS, TAGS, DENSE, LONGEST = 300, 400, 40, 3, 4
CONFIG = {
    "users": USERS,
    "items": ITEMS + 7,  # 7 rows of the table belong to no item of the catalogue
    "tags": TAGS,
    "dense": DENSE,
    "dim": 16,
    "hidden": 32,
}
INTERACTIONS_PER_USER = {"train": 20, "validation": 3, "test": 4}
SPREAD = 3.0  # standard deviation of the scores

SIGNATURE: dict[str, Any] = {
    "inputs": [
        {"kind": "id", "name": "user", "table": "of_user.user"},
        {"kind": "jagged_bag", "name": "lately", "table": "of_user.lately", "shape": [LONGEST]},
        {"kind": "id", "name": "item", "table": "of_item.item"},
        {"kind": "jagged_bag", "name": "tags", "table": "of_item.tags", "shape": [LONGEST]},
        {
            "kind": "dense",
            "name": "dense",
            "columns": [f"d{index}" for index in range(DENSE)],
            "shape": [DENSE],
        },
    ],
    "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
    "group": "user",
    "item": "item",
    "towers": {
        "query": {"module": "of_user", "inputs": ["user", "lately"]},
        "item": {"module": "of_item", "inputs": ["item", "tags", "dense"]},
    },
}


def write_retrieval_draft(
    folder: Path, *, name: str = "finder", seed: int = 0, share: str = "", **changes: Any
) -> Path:
    """Write ``model.json``, the weights and the parquet files; return the folder.

    ``share`` ties the tables of tags of both towers (``module`` or ``weight``, see ``TowerNet`` in
    ``tests/draft_network.py``; empty: not tied). ``changes`` replace fields of the signature.
    """
    config = CONFIG | ({"share": share} if share else {})
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = TowerNet(**config).eval()
    rng = np.random.default_rng(seed)
    bags = [rng.integers(0, TAGS, count) for count in rng.integers(0, LONGEST + 1, USERS)]
    # The catalogue's order is not the order of ids.
    ids = rng.permutation(ITEMS)
    items = {
        "item": pa.array(ids),
        "tags": pa.array(
            [rng.integers(0, TAGS, n).tolist() for n in rng.integers(0, LONGEST + 1, ITEMS)],
            pa.list_(pa.int64()),
        ),
        **{f"d{index}": pa.array(rng.normal(size=ITEMS)) for index in range(DENSE)},
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    lately = pa.array([bag.tolist() for bag in bags], pa.list_(pa.int64()))
    with torch.no_grad():
        scores = all_scores(model, lately, items)
        # The last layer of the user tower is scaled, and the scores with it.
        model.of_user.second.weight *= SPREAD / scores.std()
        model.of_user.second.bias *= SPREAD / scores.std()
        scores = all_scores(model, lately, items)
    # Sorting scores plus Gumbel noise samples items without replacement from their softmax.
    ranked_items = np.argsort(-(scores + rng.gumbel(size=scores.shape)), axis=1)
    start = 0
    for split, per_user in INTERACTIONS_PER_USER.items():
        items_of_split = ranked_items[:, start : start + per_user]
        start += per_user
        user = np.repeat(np.arange(USERS), per_user)
        shuffled = rng.permutation(user.size)
        columns = {
            "user": pa.array(user[shuffled]),
            "lately": lately.take(pa.array(user[shuffled])),
            "item": pa.array(ids[items_of_split.reshape(-1)[shuffled]]),
        }
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    weights = model.state_dict()
    ties = {"of_item.tags.weight": "of_user.lately.weight"} if share else {}
    save_file({k: v for k, v in weights.items() if k not in ties}, folder / "model.safetensors")
    architecture = {"path": "draft_network:TowerNet", "config": config}
    document = {
        "schema_version": 2,
        "name": name,
        "version": "1",
        "signature": SIGNATURE | changes,
        "network": {"architecture": architecture, "ties": ties},
        "data": {split: f"{split}.parquet" for split in (*INTERACTIONS_PER_USER, "items")},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder


def planted_recall(folder: Path, *, mask: bool = True) -> float:
    """Return Recall@20 of the draft's network, computed without code of recpress.

    ``mask`` removes the items of other splits from the ranking of a user.
    """
    model = TowerNet(**CONFIG)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    columns = {
        split: pq.read_table(folder / f"{split}.parquet")
        for split in (*INTERACTIONS_PER_USER, "items")
    }
    items = {
        name: columns["items"][name].combine_chunks() for name in columns["items"].column_names
    }
    ids = items["item"].to_numpy()
    bags: dict[int, list[int]] = {}
    test_items: dict[int, set[int]] = {}
    earlier_items: dict[int, set[int]] = {user: set() for user in range(USERS)}
    for split in INTERACTIONS_PER_USER:
        for row in columns[split].to_pylist():
            bags[row["user"]] = row["lately"]
            (test_items if split == "test" else earlier_items).setdefault(row["user"], set()).add(
                row["item"]
            )
    lately = pa.array([bags[user] for user in range(USERS)], pa.list_(pa.int64()))
    with torch.no_grad():
        scores = all_scores(model.eval(), lately, items)
    shares = []
    for user, item_ids in test_items.items():
        ranked = [int(ids[index]) for index in np.argsort(-scores[user], kind="stable")]
        top_items = [item for item in ranked if not mask or item not in earlier_items[user]][:20]
        shares.append(len(item_ids & set(top_items)) / len(item_ids))
    return float(np.mean(shares))


def all_scores(
    model: TowerNet, lately: pa.Array, items: Mapping[str, pa.Array]
) -> NDArray[np.float32]:
    """Return scores of every user and item, float32 ``(users, items)``."""
    dense = np.stack([items[f"d{index}"].to_numpy() for index in range(DENSE)], axis=1)
    query = model.of_user(torch.arange(USERS), *_bag(lately))
    item_vectors = model.of_item(
        torch.tensor(items["item"].to_numpy()), *_bag(items["tags"]), torch.tensor(dense).float()
    )
    scores: NDArray[np.float32] = (query @ item_vectors.T).numpy()
    return scores


def _bag(column: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of a list column, int64 ``(values,)``, and offsets, int64 ``(rows,)``."""
    lists = column.to_pylist()
    lengths = torch.tensor([len(ids) for ids in lists])
    values = torch.tensor([number for ids in lists for number in ids], dtype=torch.int64)
    return values, lengths.cumsum(0) - lengths
