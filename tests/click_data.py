"""Clicks for the documentation's examples: two ids, a list, a number and two labels."""

from pathlib import Path

import numpy as np
import pandas as pd

USERS, ITEMS = 300, 400


def write_clicks(folder: Path) -> Path:
    """Write clicks that depend on user and item, so that a trained model has a high AUC."""
    folder.mkdir()
    random = np.random.default_rng(0)
    user_factor, item_factor = random.normal(size=USERS), random.normal(size=ITEMS)
    for split, rows in {"train": 6_000, "validation": 1_000, "test": 3_000}.items():
        user, item = random.integers(0, USERS, rows), random.integers(1, ITEMS, rows)
        probability = 1 / (1 + np.exp(-user_factor[user] - item_factor[item]))
        columns = {
            "user": user,
            "item": item,
            "history": [random.integers(1, ITEMS, count) for count in random.integers(1, 9, rows)],
            "price": random.random(rows, np.float32),
            "click": (random.random(rows) < probability).astype(np.int64),
        }
        columns["liked"] = columns["click"] * (columns["price"] > 0.5)
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    return folder
