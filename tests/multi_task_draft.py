"""Write a small draft (a bundle before it is packed) of ``MultiTaskNet``.

It has three outputs, of which one has labels only in rows with a click.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from multi_task_network import MultiTaskNet
from planted_clicks import SPREAD, draw_clicks, write_files

NETWORK_MODULE = "multi_task_network"
CONFIG = {"users": 900, "items": 600, "dense": 2, "dim": 16, "hidden": 32}
ROWS = {"train": 3_000, "calibration": 800, "validation": 1_500, "test": 4_000}

SIGNATURE: dict[str, Any] = {
    "inputs": [
        {"kind": "id", "name": "user", "table": "user"},
        {"kind": "id", "name": "item", "table": "item", "out_of_range": "clamp"},
        {"kind": "dense", "name": "price", "columns": ["price", "age"], "shape": [2]},
    ],
    "outputs": [
        {"name": "click", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"},
        {
            "name": "like",
            "kind": "ctr",
            "form": "logit",
            "label": "liked",
            "label_where": "click",
            "metric": "auc",
            "loss_weight": 0.5,
        },
        {"name": "buy", "kind": "ctr", "form": "probability", "label": "bought", "metric": "auc"},
    ],
}


def write_multi_task_draft(folder: Path, *, seed: int = 0, returns: str = "tuple") -> Path:
    """Write ``model.json``, the weights and one parquet file per split; return the folder.

    Column ``liked`` is null in rows without a click. ``returns`` is the network's argument of this
    name, the form in which it returns its outputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = CONFIG | {"returns": returns}
    model = MultiTaskNet(**config).eval()
    rng = np.random.default_rng(seed)
    columns = {split: draw_columns(rows, rng) for split, rows in ROWS.items()}
    with torch.no_grad():
        for head, logits in zip(model.heads, logits_of(model, columns["train"]), strict=True):
            factor = SPREAD / logits.std()
            head.weight *= factor
            head.bias.copy_(head.bias * factor - factor * logits.mean())
        logits_by_split = {split: logits_of(model, inputs) for split, inputs in columns.items()}
    tables = {
        split: {**inputs, **draw_labels(logits_by_split[split], rng)}
        for split, inputs in columns.items()
    }
    return write_files(
        folder,
        name="feed",
        model=model,
        architecture={"path": f"{NETWORK_MODULE}:MultiTaskNet", "config": config},
        signature=SIGNATURE,
        tables=tables,
    )


def draw_columns(rows: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Draw the inputs of some rows."""
    return {
        "user": pa.array(rng.integers(0, CONFIG["users"], rows)),
        "item": pa.array(rng.integers(0, CONFIG["items"], rows)),
        "price": pa.array(rng.normal(size=rows).astype(np.float32)),
        "age": pa.array(rng.normal(size=rows).astype(np.float32)),
    }


def draw_labels(logits: torch.Tensor, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Draw the labels of some rows from the logits of the three outputs, ``(3, rows)``."""
    click, liked, bought = (draw_clicks(row.sigmoid(), rng) for row in logits)
    return {
        "click": pa.array(click),
        "liked": pa.array(liked, mask=click == 0),
        "bought": pa.array(bought),
    }


def logits_of(model: MultiTaskNet, columns: dict[str, pa.Array]) -> torch.Tensor:
    """Return the logits of the three outputs, float ``(3, rows)``, without code of recpress."""
    user, item, price, age = (torch.tensor(columns[name].to_numpy()) for name in columns)
    returns, model.returns = model.returns, "tuple"
    click, like, buy = model(user=user, item=item, price=torch.stack([price, age], dim=1))
    model.returns = returns
    return torch.stack([click.reshape(-1), like, torch.logit(buy.reshape(-1))])
