"""Random data of the network ``ShopNet`` of ``tests/new_draft_models.py``."""

from pathlib import Path

import numpy as np
import pandas as pd


def write_shop_data(folder: Path) -> Path:
    """Write data of ``ShopNet``: two ids, a list, two numbers, a text and a label.

    The network does not read the text.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, rows in {"train": 600, "test": 400}.items():
        columns = {
            "user": rng.integers(0, 40, rows),
            "item": rng.integers(0, 30, rows),
            "tags": [rng.integers(1, 20, count) for count in rng.integers(1, 6, rows)],
            "price": rng.random(rows),
            "age": rng.integers(18, 90, rows),
            "note": ["text"] * rows,
            "click": rng.integers(0, 2, rows),
        }
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    return folder
