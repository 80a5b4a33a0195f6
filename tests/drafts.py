"""Write small drafts, and run recpress on them in a child process.

A draft is the folder of a bundle before it is packed. The weights are random, and labels are drawn
with the network's probabilities (the network is "planted" in the data). Therefore no other network
fits the data better, and compression can only lower the quality. A home is the folder with
everything that recpress stores.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from draft_network import ClickNet
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[1]
NETWORK = "draft_network:ClickNet"
ALLOWED = "draft_network"  # value of RECPRESS_ALLOWED_MODULES

USERS, ITEMS, TAGS, DENSE = 3_000, 1_500, 300, 4
LONGEST = 5  # largest number of tags of a row
ROWS = {"train": 4_000, "calibration": 1_000, "validation": 1_000, "test": 3_000}
ROWS_PER_QUERY = 15  # rows of one group in the ranking draft
SPREAD = 1.1  # standard deviation of the logits; gives an AUC of about 0.75

Task = Literal["ctr", "ranking"]


def write_draft(
    folder: Path,
    *,
    name: str = "clicks",
    version: str = "1",
    task: Task = "ctr",
    seed: int = 0,
    rows: Mapping[str, int] = ROWS,
    network: str = NETWORK,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> Path:
    """Write ``model.json``, the weights and one parquet file per split; return the folder.

    Args:
        folder: the new draft.
        name: name of the bundle.
        version: its version.
        task: kind of the task; a ranking draft has grades and queries.
        seed: seed of the weights and of the data.
        rows: number of rows by split.
        network: path of the model class, ``module:Class``.
        sizes: arguments of ``ClickNet`` that replace those of ``config`` below.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = {
        "users": USERS,
        "items": ITEMS,
        "tags": TAGS,
        "dense": DENSE,
        "dim": 16,
        "hidden": 64,
        **sizes,
    }
    model = ClickNet(**config).eval()
    rng = np.random.default_rng(seed)
    columns = {split: _draw_columns(count, rng) for split, count in rows.items()}
    with torch.no_grad():
        logits = _compute_logits(model, columns["train"])
        model.out.weight *= SPREAD / logits.std()
        # Mean logit -0.5: fewer than half of the labels are positive.
        model.out.bias.copy_(-(logits * SPREAD / logits.std()).mean() - 0.5)
    start = 0  # number of the first row of a split; "at" is the column with the time of a row
    for split, columns_of_split in columns.items():
        with torch.no_grad():
            logits = _compute_logits(model, columns_of_split).numpy()
        count = len(logits)
        probability = 1 / (1 + np.exp(-logits))
        if task == "ctr":
            columns_of_split["label"] = pa.array((rng.random(count) < probability).astype(np.int64))
        else:  # grades 0 to 3, higher where the score is higher
            grade = np.clip(np.round(2 * probability + rng.normal(0, 0.5, count)), 0, 3)
            columns_of_split["label"] = pa.array(grade.astype(np.int64))
            columns_of_split["query"] = pa.array(
                start // ROWS_PER_QUERY + np.arange(count) // ROWS_PER_QUERY
            )
        columns_of_split["at"] = pa.array(start + np.arange(count))
        start += count
        pq.write_table(pa.table(columns_of_split), folder / f"{split}.parquet")
    save_file(model.state_dict(), folder / "model.safetensors")
    document = {
        "schema_version": 2,
        "name": name,
        "version": version,
        "signature": signature(task),
        "network": {"architecture": {"path": network, "config": config}},
        "data": {split: f"{split}.parquet" for split in rows},
    }
    (folder / "model.json").write_text(json.dumps(document, indent=1))
    return folder


def signature(task: Task) -> dict[str, Any]:
    """Return the signature of ``ClickNet`` for a task, as a document."""
    ranking = task == "ranking"
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
            {"kind": "jagged_bag", "name": "tags", "table": "tags", "shape": [LONGEST]},
            {
                "kind": "dense",
                "name": "dense",
                "columns": [f"d{index}" for index in range(DENSE)],
                "shape": [DENSE],
            },
        ],
        "outputs": [
            {
                "name": "label",
                "kind": task,
                "form": "score" if ranking else "logit",
                "label": "label",
                "metric": "ndcg@10" if ranking else "auc",
            }
        ],
        "group": "query" if ranking else None,
        "time": "at",
    }


def planted_auc(folder: Path) -> float:
    """Return the AUC of the draft's network on its test rows, computed without code of recpress."""
    document = json.loads((folder / "model.json").read_text())
    model = ClickNet(**document["network"]["architecture"]["config"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    table = pq.read_table(folder / "test.parquet")
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    with torch.no_grad():
        scores = _compute_logits(model.eval(), columns).numpy()
    return float(roc_auc_score(table["label"].to_numpy(), scores))


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a child process, without settings of the user who runs the tests.

    Args:
        home: folder that contains the homes of recpress and Prefect.
        more: further variables.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "RECPRESS_", "PREFECT_", "MLFLOW_"))
    }
    return {
        **inherited,
        "PYTHONPATH": str(ROOT / "tests"),
        "RECPRESS_HOME": str(home / "recpress"),
        "PREFECT_HOME": str(home / "prefect"),
        "RECPRESS_ALLOWED_MODULES": ALLOWED,
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "no-credentials"),
        "AWS_CONFIG_FILE": str(home / "no-config"),
        "AWS_EC2_METADATA_DISABLED": "true",
        **more,
    }


def recpress(
    *arguments: str, env: Mapping[str, str], seconds: float = 200
) -> "subprocess.CompletedProcess[str]":
    """Run ``recpress`` with these arguments in a child process."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.app", *arguments],
        cwd=ROOT,
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def _draw_columns(count: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Draw the inputs of ``count`` rows."""
    lengths = rng.integers(0, LONGEST + 1, count)
    bags = [rng.integers(0, TAGS, length).tolist() for length in lengths]
    columns = {
        "user": pa.array(rng.integers(0, USERS, count)),
        "item": pa.array(rng.integers(0, ITEMS, count)),
        "tags": pa.array(bags, pa.list_(pa.int64())),
    }
    for index in range(DENSE):
        columns[f"d{index}"] = pa.array(rng.normal(size=count).astype(np.float32))
    return columns


def _compute_logits(model: ClickNet, columns: Mapping[str, pa.Array]) -> torch.Tensor:
    """Return the logits of the rows, float32 ``(rows,)``."""
    bags = columns["tags"].to_pylist()
    lengths = torch.tensor([len(ids) for ids in bags])
    dense = np.stack([columns[f"d{index}"].to_numpy() for index in range(DENSE)], axis=1)
    return model(
        user=torch.tensor(columns["user"].to_numpy()),
        item=torch.tensor(columns["item"].to_numpy()),
        tags=torch.tensor([number for ids in bags for number in ids]),
        tags_offsets=lengths.cumsum(0) - lengths,
        dense=torch.tensor(dense),
    )
