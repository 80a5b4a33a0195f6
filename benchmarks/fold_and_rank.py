"""What do folding, equalization and low rank change in dense layers, and what are they worth?

On trained click models, nothing trained again: the change of AUC on test rows, mean over seeds with
its 95 % interval; the bytes of the dense layers and norms against float32; and the operators of the
graph that ONNX Runtime serves.

    python -m benchmarks.ctr --only frappe --data DATA
    python -m benchmarks.fold_and_rank --only frappe --data DATA
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path
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
from compressors.contracts import Bench
from compressors.dense.equalize import Equalize
from compressors.dense.fold import Fold
from compressors.dense.low_rank_dense import LowRankDense
from compressors.dense.smooth_quant import SmoothQuant
from compressors.dense.static_int8 import StaticInt8
from compressors.lower.export import lower
from compressors.lower.served import forms
from compressors.model import Model
from compressors.step import ModelStep, run
from infra.onnxruntime import optimized_graph

INT8 = StaticInt8()
RECIPES: dict[str, tuple[ModelStep, ...]] = {
    "`fold`": (Fold(),),
    "`fold`, rows 4096": (Fold(rows=4096),),
    "`static_int8`": (INT8,),
    "`fold`, `static_int8`": (Fold(), INT8),
    "`fold`, `equalize`, `static_int8`": (Fold(), Equalize(), INT8),
    "`fold`, `smooth_quant`, `static_int8`": (Fold(), SmoothQuant(), INT8),
    "`fold`, `smooth_quant` searched, `static_int8`": (Fold(), SmoothQuant(search=True), INT8),
    **{
        f"`fold`, `low_rank_dense` {rank:g}{'' if weighted else ', by weights alone'}": (
            Fold(),
            LowRankDense(rank=rank, weighted=weighted),
        )
        for rank in (0.4, 0.25, 0.1)
        for weighted in (True, False)
    },
    "`fold`, `low_rank_dense` 0.25, `static_int8`": (Fold(), LowRankDense(rank=0.25), INT8),
}


def dense_bytes(model: Model) -> int:
    """Bytes of dense layers and norms."""
    plan = model.plan
    return sum(line.bytes_after for line in plan.lines if line.role != "table") if plan else 0


def operators(model: Model, bench: Bench, folder: Path) -> str:
    """The products and norms of the graph as ONNX Runtime optimizes it."""
    (form,) = forms(bench.signature)
    path = folder / "model.onnx"
    lower(model.module, form, "onnxruntime", path)
    counts = Counter(node.op_type for node in optimized_graph(path).node)
    shown = ("Gemm", "FusedGemm", "MatMul", "QGemm", "BatchNormalization")
    return ", ".join(f"{counts[kind]} {kind}" for kind in shown if counts[kind])


def main() -> None:
    """Print one line a recipe, as a Markdown table."""
    asked = arguments(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(asked.threads)
    cache = asked.cache or default_cache()
    try:
        folder = data_folder(asked.data)
    except DataMissing as fault:
        sys.exit(str(fault))
    for name in [asked.only] if asked.only else get_args(Name):
        splits, _ = prepared(name, folder, cache)
        print(f"{name}, {asked.seeds} seeds")
        print("| steps | change of AUC | bytes of dense layers and norms | operators |")
        print("|---|---|---|---|")
        models = [baseline(name, seed, folder, cache) for seed in range(asked.seeds)]
        before = [auc(model.module, splits["test"]) for model, _ in models]
        for words, steps in RECIPES.items():
            changes, shares, kinds = [], [], ""
            for (model, bench), old in zip(models, before, strict=True):
                given = bench.model_copy(update={"calibration": bench.train})
                with tempfile.TemporaryDirectory() as scratch:
                    result = model
                    for number, step in enumerate(steps):
                        result = run(step, result, given, Path(scratch) / str(number))
                    changes.append(auc(result.module, splits["test"]) - old)
                    lines = result.plan.lines if result.plan else ()
                    whole = sum(line.bytes_before for line in lines if line.role != "table")
                    shares.append(dense_bytes(result) / whole)
                    kinds = kinds or operators(result, given, Path(scratch))
            mean, share = sum(changes) / len(changes), sum(shares) / len(shares)
            print(
                f"| {words} | {mean:+.5f} ± {interval(changes):.5f} | {share:.1%} | {kinds} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
