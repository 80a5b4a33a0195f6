"""Clicks for the documentation's examples: two ids, a list, a number and two labels."""

from pathlib import Path

import numpy as np
import pandas as pd

USERS, ITEMS = 300, 400


def write_clicks(folder: Path) -> Path:
    """Write clicks that depend on user and item, so that a trained model has a high AUC."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    user_factor, item_factor = rng.normal(size=USERS), rng.normal(size=ITEMS)
    for split, rows in {"train": 6_000, "validation": 1_000, "test": 3_000}.items():
        user, item = rng.integers(0, USERS, rows), rng.integers(1, ITEMS, rows)
        probability = 1 / (1 + np.exp(-user_factor[user] - item_factor[item]))
        columns = {
            "user": user,
            "item": item,
            "history": [rng.integers(1, ITEMS, count) for count in rng.integers(1, 9, rows)],
            "price": rng.random(rows, np.float32),
            "click": (rng.random(rows) < probability).astype(np.int64),
        }
        columns["liked"] = columns["click"] * (columns["price"] > 0.5)
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    return folder
