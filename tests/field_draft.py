"""Write a small draft (a bundle before it is packed) of ``FieldsNet``.

Its inputs are a matrix, bounded integers and fields of a joined table: one table with the rows of
several id columns (fields), one after the other.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from field_network import FieldsNet
from planted_clicks import CLICK, SPREAD, write_click_draft

NETWORK_MODULE = "field_network"
CONFIG = {
    "users": 900,
    "items": 600,
    "brands": 50,
    "tags": 200,
    "longest": 4,
    "dim": 16,
    "hidden": 32,
}
ROWS = {"train": 3_000, "calibration": 800, "validation": 800, "test": 3_000}
# The number of rows of each table.
TABLES = {"joined": 1_500, "wide": 1_500, "brand": 50, "tags": 200}
MAX_POSITION = 10

INPUTS: list[dict[str, Any]] = [
    {
        "kind": "id",
        "name": "ids",
        "columns": ["user", "item"],
        "shape": [2],
        "table": "joined",
        "more_tables": ["wide"],
        "fields": [
            {"rows": CONFIG["users"]},
            {"rows": CONFIG["items"], "offset": CONFIG["users"], "default_row": 7},
        ],
        "out_of_range": "default_row",
    },
    {
        "kind": "matrix",
        "name": "matrix",
        "fields": [
            {"kind": "id", "name": "brand", "table": "brand"},
            {
                "kind": "padded_bag",
                "name": "tags",
                "table": "tags",
                "shape": [CONFIG["longest"]],
                "out_of_range": "clamp",
            },
            {"kind": "dense", "name": "numbers", "columns": ["price", "age"], "shape": [2]},
        ],
    },
    {"kind": "integer", "name": "position", "low": 1, "high": MAX_POSITION},
]
SIGNATURE: dict[str, Any] = {
    "inputs": INPUTS,
    "outputs": [CLICK],
}


def write_field_draft(folder: Path, *, seed: int = 0) -> Path:
    """Write ``model.json``, the weights and one parquet file per split; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = FieldsNet(**CONFIG).eval()
    rng = np.random.default_rng(seed)
    columns = {split: draw_columns(rows, rng) for split, rows in ROWS.items()}
    with torch.no_grad():
        # Scale the logits so that ``SPREAD`` is their standard deviation on the training rows.
        factor = SPREAD / compute_logits(model, columns["train"]).std()
        for parameter in (model.out.weight, model.out.bias, model.wide.weight):
            parameter *= factor
        logits = {split: compute_logits(model, inputs) for split, inputs in columns.items()}
    return write_click_draft(
        folder,
        name="fields",
        model=model,
        architecture={"path": f"{NETWORK_MODULE}:FieldsNet", "config": CONFIG},
        signature=SIGNATURE,
        columns=columns,
        logits=logits,
        rng=rng,
    )


def draw_columns(rows: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Draw the inputs of some rows."""
    lengths = rng.integers(0, CONFIG["longest"] + 1, rows)
    tags = [rng.integers(1, CONFIG["tags"], length).tolist() for length in lengths]
    return {
        "user": pa.array(rng.integers(0, CONFIG["users"], rows)),
        "item": pa.array(rng.integers(0, CONFIG["items"], rows)),
        "brand": pa.array(rng.integers(0, CONFIG["brands"], rows)),
        "tags": pa.array(tags, pa.list_(pa.int64())),
        "price": pa.array(rng.normal(size=rows).astype(np.float32)),
        "age": pa.array(rng.normal(size=rows).astype(np.float32)),
        "position": pa.array(rng.integers(1, MAX_POSITION + 1, rows)),
    }


def compute_logits(model: FieldsNet, columns: dict[str, pa.Array]) -> torch.Tensor:
    """Return the network's logits, float ``(rows,)``, without code of recpress."""
    tags = columns["tags"].to_pylist()
    padded = [row + [0] * (CONFIG["longest"] - len(row)) for row in tags]
    names = ("user", "item", "brand", "price", "age", "position")
    user, item, brand, price, age, position = (
        torch.tensor(columns[name].to_numpy()) for name in names
    )
    matrix = torch.cat(
        [
            brand[:, None].float(),
            torch.tensor(padded).float(),
            torch.stack([price, age], dim=1).float(),
        ],
        dim=1,
    )
    logits: torch.Tensor = model(torch.stack([user, item], dim=1), matrix, position)
    return logits
