"""Random data that the models of ``library_models.py`` read. It is not a test file."""

from pathlib import Path

import numpy as np
import pandas as pd

USERS, ITEMS, GENRES, LONGEST = 50, 80, 18, 6
"""Rows of the tables, and the length of the longest list."""


def write_rows(folder: Path) -> None:
    """Write rows with clicks; ``validation`` is for presets with a quality budget."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, rows in {"train": 400, "test": 600, "validation": 300}.items():
        lengths = rng.integers(1, LONGEST + 1, rows)
        click = rng.integers(0, 2, rows)
        columns = {
            "user": rng.integers(0, USERS, rows),
            "item": rng.integers(1, ITEMS, rows),
            "genre": rng.integers(0, GENRES, rows),
            "price": rng.random(rows, np.float32),
            "age": rng.integers(18, 80, rows),
            # Models of torch-rechub need lists of one length.
            "history": list(rng.integers(1, ITEMS, (rows, LONGEST))),
            "recent": [rng.integers(1, ITEMS, length) for length in lengths],
            "click": click,
            "like": click * rng.integers(0, 2, rows),
        }
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")


def write_interactions(folder: Path) -> None:
    """Write interactions of members with products, and the catalogue of products.

    The towers' features have other names than those of ``write_rows``, because both are defined in
    one module. ``lately`` has the products that a member has bought recently.
    """
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lately = [rng.integers(1, ITEMS, length) for length in rng.integers(1, 6, USERS)]
    for split, rows in {"train": 600, "test": 300, "validation": 200}.items():
        member = rng.integers(0, USERS, rows)
        columns = {
            "member": member,
            "lately": [lately[number] for number in member],
            "product": rng.integers(1, ITEMS, rows),
        }
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    products = np.arange(1, ITEMS)
    kinds = rng.integers(0, GENRES, len(products))
    pd.DataFrame({"product": products, "kind": kinds}).to_parquet(folder / "items.parquet")
