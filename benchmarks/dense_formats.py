"""How much AUC does a click model lose if its dense layers have few bits or 2:4 sparsity?

Each step runs on the tuned networks of ``benchmarks/ctr.py`` with several seeds, without any
training. The loss is the network's AUC minus the AUC of the compressed network, as mean over seeds
± half the width of its 95 % interval (Student's t). Bytes are the stored bytes of all dense layers,
including scales, biases and padding, as a share of float32. Tables stay in float32.

    python -m benchmarks.dense_formats --only frappe --seeds 5
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from pydantic import TypeAdapter

from benchmarks.ctr import (
    Name,
    auc,
    compute_interval_half_width,
    create_parser,
    data_folder,
    default_cache,
    load_baseline,
    prepare_splits,
)
from compressors.contracts import Bench, Split
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.core.units import Unit
from examples.public_data import DataMissing

STEP_ADAPTER = TypeAdapter(AnyStep)
# ``static_int8`` rounds inputs with ranges from calibration. ``weight_int8`` rounds inputs at run
# time unless they stay in float, ``weight_int4`` only with "int8 inputs". A block is a group of
# weights of one row that share a scale; block 0 is the whole row. ``min_max`` clips no weight; by
# default, each block has the range with the smallest squared error. GPTQ rounds weights one after
# the other, and corrects the remaining ones for the error on calibration rows. "Reconstructed": the
# weights that 2:4 sparsity keeps are refitted by least squares on calibration rows.
GPTQ = {"kind": "weight_int4", "rounding": "gptq"}
LABELED_STEPS: list[tuple[str, dict[str, Any]]] = [
    ("float16", {"kind": "float16", "tables": ()}),  # no tables, only dense layers
    ("static_int8", {"kind": "static_int8"}),
    ("weight_int8", {"kind": "weight_int8"}),
    ("weight_int8, float inputs", {"kind": "weight_int8", "activations": "float32"}),
    ("weight_int4, blocks of 32", {"kind": "weight_int4"}),
    ("weight_int4, blocks of 32, min_max", {"kind": "weight_int4", "clipping": "min_max"}),
    ("weight_int4, blocks of 32, GPTQ", GPTQ),
    ("weight_int4, blocks of 32, GPTQ, int8 inputs", {**GPTQ, "activations": "int8"}),
    ("weight_int4, one block per row", {"kind": "weight_int4", "block": 0}),
    ("weight_int4, one block per row, GPTQ", {**GPTQ, "block": 0}),
    ("float8_dense", {"kind": "float8_dense"}),
    ("float8_dense, one scale per layer", {"kind": "float8_dense", "scales": "layer"}),
    (
        "2:4 by magnitude",
        {"kind": "sparse_2_4", "reconstruct": False},
    ),
    (
        "2:4 by activation",
        {"kind": "sparse_2_4", "importance": "activation", "reconstruct": False},
    ),
    ("2:4 by magnitude, reconstructed", {"kind": "sparse_2_4"}),
    ("2:4 by activation, reconstructed", {"kind": "sparse_2_4", "importance": "activation"}),
]


def dense_bytes(model: Model) -> int:
    """Return the stored bytes of all dense layers."""
    return sum(unit.bytes for unit in Unit.of(model.module) if unit.role == "dense")


def measure(model: Model, bench: Bench, splits: Sequence[Split]) -> dict[str, list[float]]:
    """Run every step on one network.

    Returns:
        By label of the step, the bytes of dense layers as a share of the original's, then the loss
        of AUC on each split.
    """
    bench = bench.model_copy(update={"calibration": bench.train})
    before = [auc(model.module, split) for split in splits]
    results = {}
    for label, step in LABELED_STEPS:
        with tempfile.TemporaryDirectory() as scratch:
            compressed = run(STEP_ADAPTER.validate_python(step), model, bench, Path(scratch))
            after = [auc(compressed.module, split) for split in splits]
        losses = [old - new for old, new in zip(before, after, strict=True)]
        results[label] = [dense_bytes(compressed) / dense_bytes(model), *losses]
        print(label, *(f"{loss:.5f}" for loss in losses), file=sys.stderr, flush=True)
    return results


def main() -> None:
    """Print one Markdown table per data set."""
    args = create_parser((__doc__ or "").splitlines()[0]).parse_args()
    torch.set_num_threads(args.threads)
    cache = args.cache or default_cache()
    try:
        folder = data_folder(args.data)
    except DataMissing as error:
        sys.exit(str(error))
    for name in [args.only] if args.only else get_args(Name):
        splits, _ = prepare_splits(name, folder, cache)
        print(f"\n{name}, {args.seeds} seeds\n")
        print("| stored as | bytes of dense layers | loss of AUC, test rows | validation rows |")
        print("|---|---|---|---|")
        results = [
            measure(
                *load_baseline(name, seed, folder, cache), (splits["test"], splits["validation"])
            )
            for seed in range(args.seeds)
        ]
        for label, _ in LABELED_STEPS:
            values = [result[label] for result in results]
            cells = [f"{mean(value[0] for value in values):.1%}"]
            for column in (1, 2):
                losses = [value[column] for value in values]
                cells.append(f"{mean(losses):.5f} ± {compute_interval_half_width(losses):.5f}")
            print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
