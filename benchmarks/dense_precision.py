"""What do int8, float16 and bfloat16 dense layers cost, by calibrator, and with training?

On tuned click models (``benchmarks/ctr.py``), tables left in float32. The change of AUC on
validation rows, by which settings were chosen, and on test rows, mean over seeds with Student's
95 % interval. Calibrated on the first 4,096 training rows.

    python -m benchmarks.dense_precision --data FOLDER --only frappe
"""

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import get_args

import torch

from benchmarks.ctr import (
    DataMissing,
    Name,
    arguments,
    auc,
    baseline,
    data_folder,
    default_cache,
    interval,
    prepared,
)
from compressors.core.runner import ModelStep, run
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.qat import QAT
from compressors.quantize.dense.static_int8 import StaticInt8

STEPS: dict[str, ModelStep] = {
    **{
        f"`static_int8`, `{how}`": StaticInt8(calibrator=how)
        for how in ("min_max", "percentile", "entropy", "mse", "best")
    },
    "`static_int8`, `min_max`, weights by `mse`": StaticInt8(weights="mse"),
    "`float16`, tables as well": Float16(),
    "`bfloat16_dense`": BFloat16Dense(),
    "`qat`, taught": QAT(),
    "`qat`, labels alone": QAT(soft_share=0),
}


def main() -> None:
    """Print one line a step, as a Markdown table."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="*", help="only those whose name has one of these words")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cache = asked.cache or default_cache()
    try:
        folder = data_folder(asked.data)
    except DataMissing as fault:
        sys.exit(str(fault))
    print("| data | dense layers | validation AUC | test AUC | seconds |")
    print("|---|---|---|---|---|")
    for name in [asked.only] if asked.only else get_args(Name):
        splits, _ = prepared(name, folder, cache)
        parts = ("validation", "test")
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        taken = [
            told for told in STEPS if not asked.steps or any(word in told for word in asked.steps)
        ]
        for seed in range(asked.seeds):
            model, bench = baseline(name, seed, folder, cache)
            bench = bench.model_copy(update={"calibration": bench.train})
            before = {part: auc(model.module, splits[part]) for part in parts}
            for told in taken:
                with tempfile.TemporaryDirectory() as scratch:
                    begun = time.perf_counter()
                    made = run(STEPS[told], model, bench, Path(scratch))
                    found[told, "seconds"].append(time.perf_counter() - begun)
                    for part in parts:
                        change = auc(made.module, splits[part]) - before[part]
                        found[told, part].append(change)
                print(name, seed, told, found[told, "validation"][-1], file=sys.stderr, flush=True)
                if made.plan is not None:
                    for line in made.plan.lines:
                        if line.role == "dense":
                            print(f"  {line.module}: {line.reason}", file=sys.stderr)
        for told in taken:
            cells = [f"{mean(found[told, p]):+.6f} ± {interval(found[told, p]):.6f}" for p in parts]
            cells.append(f"{mean(found[told, 'seconds']):.0f}")
            print(f"| {name} | {told} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
