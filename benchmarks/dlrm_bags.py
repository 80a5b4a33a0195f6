"""How fast is a DLRM with 26 lists of ids per row, as in Criteo's terabyte data, when compressed?

Writes the draft (the folder that becomes a bundle) of a DLRM with random weights, 13 numbers and 26
jagged bags per row, and random data. Its scores have no meaning; ``benchmarks.reference_models
dlrm-bags`` packs it, compresses it and prints bytes and latencies.

    python -m benchmarks.dlrm_bags FOLDER --seed 1
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from compressors.contracts import Architecture, Signature
from examples.dlrm import DLRM
from examples.draft import write_draft

NUMBERS, BAGS, ROWS_OF_TABLE = 13, 26, 10_000
LONGEST = 5
"""Largest number of ids in a list; lengths are uniform from 0."""
ROWS = {"train": 2_000, "calibration": 1_000, "validation": 500, "test": 2_000}
CONFIG = {
    "bags": [{"name": f"bag{index}", "rows": ROWS_OF_TABLE} for index in range(BAGS)],
    "dense": NUMBERS,
    "dim": 16,
    "bottom": [512, 256, 64],
    "top": [512, 256],
}
"""Arguments of the network: the layers of the DLRM paper's Criteo model, with smaller tables."""


def build_signature() -> Signature:
    """Return the signature: the numbers as one dense input, and the jagged bags."""
    bags = [
        {
            "kind": "jagged_bag",
            "name": f"bag{index}",
            "table": f"bags.bag{index}",
            "shape": [LONGEST],
        }
        for index in range(BAGS)
    ]
    columns = [f"number{index}" for index in range(NUMBERS)]
    dense = {"kind": "dense", "name": "dense", "columns": columns, "shape": [NUMBERS]}
    click = {"name": "score", "kind": "ctr", "form": "logit", "label": "label", "metric": "auc"}
    return Signature.model_validate({"inputs": [dense, *bags], "outputs": [click]})


def draw_rows(count: int, random: np.random.Generator) -> pa.Table:
    """Draw rows with normal numbers, uniform ids and lengths, and balanced labels."""
    columns = {
        f"number{index}": pa.array(random.standard_normal(count).astype(np.float32))
        for index in range(NUMBERS)
    }
    for index in range(BAGS):
        lengths = random.integers(0, LONGEST + 1, count)
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        ids = random.integers(0, ROWS_OF_TABLE, int(lengths.sum()))
        columns[f"bag{index}"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
    columns["label"] = pa.array(np.arange(count) % 2)
    return pa.table(columns)


def main() -> None:
    """Write the draft."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random = np.random.default_rng(args.seed)
    write_draft(
        args.folder,
        name="random-dlrm-bags",
        architecture=Architecture(path="examples.dlrm:DLRM", config=CONFIG),
        network=DLRM(**CONFIG),
        signature=build_signature(),
        splits={split: draw_rows(count, random) for split, count in ROWS.items()},
    )


if __name__ == "__main__":
    main()
