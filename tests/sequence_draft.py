"""Write a small draft (a bundle before it is packed) of ``SequenceNet``.

The inputs of this click network are two lists of ids with any length from 1 to 12, and one id. The
labels are drawn with the probabilities that the network predicts (``planted_clicks.py``).
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from planted_clicks import CLICK, SPREAD, write_click_draft
from sequence_network import SequenceNet

NETWORK_MODULE = "sequence_network"
CONFIG = {"items": 800, "categories": 60, "longest": 12, "dim": 16, "hidden": 32}
TABLES = {"item": 800, "category": 60}  # the number of rows of each table
ROWS = {"train": 2_500, "calibration": 600, "validation": 600, "test": 2_500}

Padding = Literal["left", "right"]


def signature(padding: Padding = "right") -> dict[str, Any]:
    """Return the signature as in ``model.json``."""
    return {
        "inputs": [
            {
                "kind": "sequence",
                "name": "history",
                "shape": [CONFIG["longest"]],
                "table": "item",
                "padding": padding,
                "mask": "history_mask",
                "positions": "history_positions",
                "first_position": 1,
                "out_of_range": "default_row",
            },
            {
                "kind": "sequence",
                "name": "categories",
                "shape": [CONFIG["longest"]],
                "table": "category",
                "padding": padding,
                "lengths": "category_count",
                "same_length_as": "history",
            },
            {"kind": "id", "name": "item", "table": "item"},
        ],
        "outputs": [CLICK],
    }


def write_sequence_draft(folder: Path, padding: Padding = "right", *, seed: int = 0) -> Path:
    """Write ``model.json``, the weights and one parquet file per split; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = SequenceNet(**CONFIG).eval()
    rng = np.random.default_rng(seed)
    columns = {split: draw_columns(rows, rng) for split, rows in ROWS.items()}
    with torch.no_grad():
        factor = SPREAD / compute_logits(model, columns["train"]).std()
        for parameter in (model.out.weight, model.out.bias):
            parameter *= factor
    return write_click_draft(
        folder,
        name="sequences",
        model=model,
        architecture={"path": f"{NETWORK_MODULE}:SequenceNet", "config": CONFIG},
        signature=signature(padding),
        columns=columns,
        logits={split: compute_logits(model, inputs) for split, inputs in columns.items()},
        rng=rng,
    )


def draw_columns(rows: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Draw the inputs of some rows; the two lists of a row have the same length."""
    lengths = rng.integers(1, CONFIG["longest"] + 1, rows)

    def draw_lists(table_rows: int) -> pa.Array:
        lists = [rng.integers(1, table_rows, length).tolist() for length in lengths]
        return pa.array(lists, pa.list_(pa.int64()))

    return {
        "history": draw_lists(CONFIG["items"]),
        "categories": draw_lists(CONFIG["categories"]),
        "item": pa.array(rng.integers(1, CONFIG["items"], rows)),
    }


def compute_logits(model: SequenceNet, columns: dict[str, pa.Array]) -> torch.Tensor:
    """Return the network's logits, float ``(rows,)``, row by row and so without padding."""
    rows = zip(
        *(columns[name].to_pylist() for name in ("history", "categories", "item")), strict=True
    )
    with torch.no_grad():
        return torch.cat(
            [
                model(
                    torch.tensor([history]),
                    torch.ones(1, len(history)),
                    torch.arange(1, len(history) + 1)[None],
                    torch.tensor([categories]),
                    torch.tensor([len(categories)]),
                    torch.tensor([item]),
                )
                for history, categories, item in rows
            ]
        )
