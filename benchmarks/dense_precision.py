"""How much AUC do int8, float16 and bfloat16 dense layers cost, by calibrator and with training?

Each step runs on the tuned click models of ``benchmarks/ctr.py``, with float32 tables. The change
of AUC is printed for validation rows, with which the settings were selected, and for test rows, as
mean over seeds ± half the width of its 95 % interval (Student's t).

A calibrator is a rule that chooses the range of a layer's quantized inputs (the setting
``calibrator`` of ``static_int8``); "best" selects a rule per layer. "Weights by `mse`": the range
of the weights is the one with the smallest squared error. Calibration uses the first 4,096 training
rows. ``qat`` trains the network (quantization-aware training), on labels and soft labels or on the
labels only.

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
    Name,
    auc,
    compute_interval_half_width,
    create_parser,
    data_folder,
    default_cache,
    load_baseline,
    prepare_splits,
)
from compressors.core.runner import run
from compressors.core.steps.step import Step
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.qat import QAT
from compressors.quantize.dense.static_int8 import StaticInt8
from examples.public_data import DataMissing

STEPS: dict[str, Step] = {
    **{
        f"`static_int8`, `{calibrator}`": StaticInt8(calibrator=calibrator)
        for calibrator in ("min_max", "percentile", "entropy", "mse", "best")
    },
    "`static_int8`, `min_max`, weights by `mse`": StaticInt8(weights="mse"),
    "`float16`, tables as well": Float16(),
    "`bfloat16_dense`": BFloat16Dense(),
    "`qat`, with soft labels": QAT(),
    "`qat`, labels only": QAT(soft_share=0),
}


def main() -> None:
    """Print a Markdown table with one line per step."""
    parser = create_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", nargs="*", help="run only steps whose name contains one of these words"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = args.cache or default_cache()
    try:
        folder = data_folder(args.data)
    except DataMissing as error:
        sys.exit(str(error))
    print("| data | dense layers | validation AUC | test AUC | seconds |")
    print("|---|---|---|---|---|")
    for name in [args.only] if args.only else get_args(Name):
        splits, _ = prepare_splits(name, folder, cache)
        parts = ("validation", "test")
        results: dict[tuple[str, str], list[float]] = defaultdict(list)
        selected = [
            step for step in STEPS if not args.steps or any(word in step for word in args.steps)
        ]
        for seed in range(args.seeds):
            model, bench = load_baseline(name, seed, folder, cache)
            bench = bench.model_copy(update={"calibration": bench.train})
            before = {part: auc(model.module, splits[part]) for part in parts}
            for step in selected:
                with tempfile.TemporaryDirectory() as scratch:
                    start = time.perf_counter()
                    result = run(STEPS[step], model, bench, Path(scratch))
                    results[step, "seconds"].append(time.perf_counter() - start)
                    for part in parts:
                        change = auc(result.module, splits[part]) - before[part]
                        results[step, part].append(change)
                print(
                    name, seed, step, results[step, "validation"][-1], file=sys.stderr, flush=True
                )
                if result.plan is not None:
                    for line in result.plan.lines:
                        if line.role == "dense":
                            print(f"  {line.module}: {line.reason}", file=sys.stderr)
        for step in selected:
            cells = []
            for part in parts:
                changes = results[step, part]
                cells.append(f"{mean(changes):+.6f} ± {compute_interval_half_width(changes):.6f}")
            cells.append(f"{mean(results[step, 'seconds']):.0f}")
            print(f"| {name} | {step} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
