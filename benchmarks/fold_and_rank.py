"""How do folding, equalization and low rank change AUC, bytes and operators of dense layers?

Each recipe runs on trained click models, without further training. Prints

- the change of AUC on test rows, as mean over seeds ± half the width of its 95 % interval;
- the bytes of dense layers and norms, as a share of float32;
- the operators of the graph that ONNX Runtime runs.

``fold`` merges norms into adjacent layers. ``equalize`` gives the channels between consecutive
layers equal weight ranges, without a change of scores (cross-layer equalization).

In a label, the number after ``low_rank_dense`` is the rank as a share of the full rank; "within"
means that the number is a bound on the relative squared error instead. The factors minimize the
error of the outputs on calibration rows, or the error of the weights ("by weights alone").
``smooth_quant`` moves part of the range of a layer's inputs into its weights, by default half of it
on a logarithmic scale; "searched" means that the part with the smallest int8 error is searched for
each layer.

    python -m benchmarks.ctr --only frappe --data DATA
    python -m benchmarks.fold_and_rank --only frappe --data DATA
"""

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
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
from compressors.contracts import Bench, Plan, Split
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.steps.step import Step
from compressors.factorize.low_rank_dense import LowRankDense
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.rewrite.equalize import Equalize
from compressors.rewrite.fold import Fold
from compressors.rewrite.smooth_quant import SmoothQuant
from examples.public_data import DataMissing
from infra.onnxruntime.sessions import optimized_graph

INT8 = StaticInt8()
RECIPES: dict[str, tuple[Step, ...]] = {
    "`fold`": (Fold(),),
    "`static_int8`": (INT8,),
    "`fold`, `static_int8`": (Fold(), INT8),
    "`fold`, `equalize`, `static_int8`": (Fold(), Equalize(), INT8),
    "`fold`, `smooth_quant`, `static_int8`": (Fold(), SmoothQuant(), INT8),
    "`fold`, `smooth_quant` searched, `static_int8`": (Fold(), SmoothQuant(search=True), INT8),
    **{  # ``weighted``: minimize the error of the outputs instead of the error of the weights
        f"`fold`, `low_rank_dense` {rank:g}{'' if weighted else ', by weights alone'}": (
            Fold(),
            LowRankDense(rank=rank, weighted=weighted),
        )
        for rank in (0.4, 0.25, 0.1)
        for weighted in (True, False)
    },
    **{
        f"`fold`, `low_rank_dense` within {error:g}": (Fold(), LowRankDense(most_error=error))
        for error in (0.01, 0.03)
    },
    "`fold`, `low_rank_dense` 0.25, `static_int8`": (Fold(), LowRankDense(rank=0.25), INT8),
    "`fold`, `low_rank_dense` within 0.01, `static_int8`": (
        Fold(),
        LowRankDense(most_error=0.01),
        INT8,
    ),
}


def dense_bytes_share(model: Model) -> float:
    """Return the bytes of dense layers and norms, as a share of the bytes before compression."""
    lines = [line for line in (model.plan or Plan()).lines if line.role != "table"]
    return sum(line.bytes_after for line in lines) / sum(line.bytes_before for line in lines)


def count_operators(model: Model, bench: Bench, folder: Path) -> str:
    """Return the number of matrix products and norms in ONNX Runtime's optimized graph, as text."""
    (graph,) = served_graphs(bench.signature)
    path = folder / "model.onnx"
    lower(model.module, graph, "onnxruntime", path)
    counts = Counter(node.op_type for node in optimized_graph(path).node)
    shown = ("Gemm", "FusedGemm", "MatMul", "QGemm", "BatchNormalization")
    return ", ".join(f"{counts[op_type]} {op_type}" for op_type in shown if counts[op_type])


@dataclass
class RecipeResults:
    """Results of one recipe.

    Attributes:
        changes: changes of AUC, one per seed.
        shares: bytes of dense layers and norms as shares of float32, one per seed.
        operators: numbers of operators in the optimized graph, as text.
    """

    changes: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    operators: str = ""


def measure(model: Model, bench: Bench, test: Split, results: dict[str, RecipeResults]) -> None:
    """Run every recipe on one network and append its results to ``results``, by label.

    Steps with which several recipes start are run only once.
    """
    before = auc(model.module, test)
    models: dict[tuple[Step, ...], Model] = {(): model}  # by the steps that have been applied
    with tempfile.TemporaryDirectory() as scratch:
        for label, steps in RECIPES.items():
            for count in range(1, len(steps) + 1):
                previous, step = steps[: count - 1], steps[count - 1]
                if steps[:count] not in models:
                    folder = Path(scratch) / str(len(models))
                    models[steps[:count]] = run(step, models[previous], bench, folder)
            result, line = models[steps], results.setdefault(label, RecipeResults())
            line.changes.append(auc(result.module, test) - before)
            line.shares.append(dense_bytes_share(result))
            line.operators = line.operators or count_operators(result, bench, Path(scratch))


def main() -> None:
    """Print a Markdown table with one line per recipe."""
    args = create_parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(args.threads)
    cache = args.cache or default_cache()
    try:
        folder = data_folder(args.data)
    except DataMissing as error:
        sys.exit(str(error))
    for name in [args.only] if args.only else get_args(Name):
        splits, _ = prepare_splits(name, folder, cache)
        results: dict[str, RecipeResults] = {}
        for seed in range(args.seeds):
            model, bench = load_baseline(name, seed, folder, cache)
            bench = bench.model_copy(update={"calibration": bench.train})
            measure(model, bench, splits["test"], results)
        print(f"{name}, {args.seeds} seeds")
        print("| steps | change of AUC | bytes of dense layers and norms | operators |")
        print("|---|---|---|---|")
        for label, line in results.items():
            mean, share = (sum(values) / args.seeds for values in (line.changes, line.shares))
            change = f"{mean:+.5f} ± {compute_interval_half_width(line.changes):.5f}"
            print(f"| {label} | {change} | {share:.1%} | {line.operators} |")


if __name__ == "__main__":
    main()
