"""Random data of the network ``ShopNet`` of ``tests/new_draft_models.py``."""

from pathlib import Path

import numpy as np
import pandas as pd


def write_shop_data(folder: Path) -> Path:
    """Write data of ``ShopNet``: two ids, a list, two numbers and a label."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, rows in {"train": 600, "test": 400}.items():
        columns = {
            "user": random.integers(0, 40, rows),
            "item": random.integers(0, 30, rows),
            "tags": [random.integers(1, 20, count) for count in random.integers(1, 6, rows)],
            "price": random.random(rows),
            "age": random.integers(18, 90, rows),
            "note": ["text"] * rows,
            "click": random.integers(0, 2, rows),
        }
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    return folder
