"""How small and how fast does a whole click model become, tables and dense layers together?

The model is the tuned DCN-v2 of ``benchmarks/ctr.py`` on Frappe: 1.8 MB, 87 % of it in dense
layers. Recipes of recpress are compared with tools ("peers") that quantize the ONNX graph of the
same trained network: ONNX Runtime's ``quantize_dynamic`` and ``quantize_static`` (with and without
tables), and NVIDIA ModelOpt if it is installed (``nvidia-modelopt onnx-graphsurgeon polygraphy
cppimport lief onnxslim onnxconverter-common``; its extra ``onnx`` needs other versions than ours).

Every result is evaluated as a graph in ONNX Runtime. The loss is the AUC of the network minus the
AUC of the compressed network, as mean over seeds ± half the width of its 95 % interval (Student's
t). "smaller" is the ratio of the bytes of all stored tensors, "file smaller" that of the graph
files. Validation rows selected the recipes. Latency is measured with inputs that are already bound
(IO binding). "the same" in a label is the recipe of the line above, with the named change. "8 and 6
codes a row" are those of the tables ``item`` and ``user``. A percentage is the bound on the
relative squared error of the outputs of low-rank layers.

    python -m benchmarks.whole_model --seeds 5 --picture docs/pictures/whole_model.png
    python -m benchmarks.whole_model --speed     # latency of the first network's graphs
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from benchmarks.ctr import (
    DataMissing,
    compute_interval_half_width,
    create_parser,
    data_folder,
    default_cache,
    load_baseline,
    load_split,
    prepare_splits,
)
from benchmarks.table_front import GOAL, KMEANS_FOR_TINY_TABLES, RECIPE_ADAPTER
from compressors.contracts import Bench, Network, Plan, Split, digest
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.state.module_state import load
from compressors.core.units import stored_bytes
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.metrics import point_estimates
from examples.dcnv2 import DCNv2
from infra.onnxruntime.sessions import OnnxRuntime, Session
from infra.timing import describe_machine, measure_interleaved_ms

Steps = list[dict[str, Any]]
Arrays = dict[str, NDArray[Any]]
Peer = Callable[[Path, Path, Arrays], None]  # of source graph, output graph, calibration rows

NAME = "frappe"
CALIBRATION_ROWS = 4096
ROUNDS = 10
# Batch size -> consecutive calls of one session in a round.
CALLS = {1: 400, 256: 40}
THREADS = 2
HOST = describe_machine("ONNX Runtime", OnnxRuntime().version(), THREADS)


def build_student_step(hidden: list[int], cross: int, dropout: float) -> dict[str, Any]:
    """Return a ``distill`` step for a smaller network of the same class.

    Args:
        hidden: widths of the student's perceptron.
        cross: number of its cross layers.
        dropout: its dropout probability in training.
    """
    return {
        "kind": "distill",
        "soft_share": 0.7,
        "student": {"hidden": hidden, "cross_layers": cross, "dropout": dropout},
        "training": {
            "epochs": 40,
            "batch": 4096,
            "learning_rate": 1e-3,
            "patience": 3,
            "warmup": 0,
            "tables": True,
            "table_l2": 0.05,
        },
    }


INT8_LAYERS: Steps = [{"kind": "fold"}, {"kind": "static_int8"}]  # fold: merge norms into layers


def build_code_steps(item: int, user: int, location: int = 2) -> Steps:
    """Return steps for tables: additive codes for large fields, 2 bits per weight for tiny ones.

    Args:
        item: number of codes of a row of the table ``item``.
        user: number of codes of a row of the table ``user``.
        location: number of codes of a row of the tables ``country`` and ``city``.
    """
    return [
        KMEANS_FOR_TINY_TABLES,
        *(
            {"kind": "additive_codes", "codebooks": count, "rounds": 60, "tables": names}
            for count, names in (
                (item, ("tables.item",)),
                (user, ("tables.user",)),
                (location, ("tables.country", "tables.city")),
            )
        ),
    ]


def build_low_rank_step(most_error: float) -> dict[str, Any]:
    """Return a ``low_rank_dense`` step with a bound on the outputs' relative squared error."""
    return {"kind": "low_rank_dense", "most_error": most_error}


INT4_TABLES: Steps = [{"kind": "rowwise_int4", "clipping": "least_squares"}]
INT4_LAYERS: Steps = [{"kind": "fold"}, {"kind": "weight_int4", "block": 0}]  # 0: scale per row
STUDENT = build_student_step([200, 200], cross=3, dropout=0.3)
RECIPES: list[tuple[str, Steps]] = [
    ("int8 tables and layers", [{"kind": "rowwise_int8"}, *INT8_LAYERS]),
    ("student 200-200, int4 tables, int8 layers", [STUDENT, *INT4_TABLES, *INT8_LAYERS]),
    (
        "the same, layers of low rank (2 %)",
        [STUDENT, build_low_rank_step(0.02), *INT4_TABLES, *INT8_LAYERS],
    ),
    ("the same, 3 %", [STUDENT, build_low_rank_step(0.03), *INT4_TABLES, *INT8_LAYERS]),
    (
        "the same, 8 and 6 codes a row",
        [STUDENT, build_low_rank_step(0.03), *build_code_steps(8, 6), *INT8_LAYERS],
    ),
    (
        "the same, int4 layers",
        [STUDENT, build_low_rank_step(0.03), *build_code_steps(8, 6), *INT4_LAYERS],
    ),
    (
        "the same, 5 %, 6 and 6 codes",
        [STUDENT, build_low_rank_step(0.05), *build_code_steps(6, 6), *INT4_LAYERS],
    ),
    (
        "the same, 8 %, 4 and 4 codes",
        [STUDENT, build_low_rank_step(0.08), *build_code_steps(4, 4), *INT4_LAYERS],
    ),
]


# --- peers -----------------------------------------------------------------------------------


class _CalibrationReader:
    """Calibration rows as a single batch, for ``quantize_static``."""

    def __init__(self, rows: Arrays) -> None:
        self._remaining: Iterator[Arrays] = iter([rows])

    def get_next(self) -> Arrays | None:
        return next(self._remaining, None)


def quantize_dynamically(source: Path, output: Path, rows: Arrays) -> None:  # noqa: ARG001
    """Quantize with ONNX Runtime: int8 weights, inputs quantized at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    reduce_range = not HOST.int8_dot  # 8-bit MatMuls saturate without VNNI
    quantize_dynamic(
        source, output, weight_type=QuantType.QInt8, per_channel=True, reduce_range=reduce_range
    )


def build_static_quantizer(*operators: str) -> Peer:
    """Return ONNX Runtime's static quantizer for these operator types; for all if none is given."""

    def quantize(source: Path, output: Path, rows: Arrays) -> None:
        from onnxruntime.quantization import QuantType, quantize_static

        quantize_static(
            source,
            output,
            _CalibrationReader(rows),
            op_types_to_quantize=list(operators) or None,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=not HOST.int8_dot,  # 8-bit MatMuls saturate without VNNI
        )

    return quantize


def quantize_with_modelopt(source: Path, output: Path, rows: Arrays) -> None:
    """Quantize to int8 with NVIDIA ModelOpt."""
    from modelopt.onnx.quantization import quantize

    with contextlib.redirect_stdout(sys.stderr):  # its calibration prints to stdout
        quantize(
            str(source),
            quantize_mode="int8",
            calibration_data=rows,
            # Without shapes ModelOpt treats a batch as one row and quantizes no MatMul.
            calibration_shapes=",".join(f"{name}:{len(ids)}" for name, ids in rows.items()),
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",  # CPUs have no float16 MatMul
            dq_only=True,  # else weights are stored as float32, followed by QuantizeLinear
            output_path=str(output),
            log_level="ERROR",
        )


PEERS: list[tuple[str, Peer]] = [
    ("quantize_dynamic", quantize_dynamically),
    ("quantize_static, all of it", build_static_quantizer()),
    ("quantize_static, Gemm only", build_static_quantizer("Gemm", "MatMul")),
    ("ModelOpt int8", quantize_with_modelopt),
]


# --- one network -----------------------------------------------------------------------------


def run_recipe(steps: Steps, model: Model, bench: Bench, cache: Path) -> Model:
    """Run a recipe; the result after each step is stored in ``cache`` and reused."""
    result = model
    for number, step in enumerate(RECIPE_ADAPTER.validate_python(steps), 1):
        folder = cache / f"recipe-{digest(steps[:number])[:16]}"
        if not (folder / "network.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            compressed = run(step, result, bench, folder)
            (folder / "plan.json").write_text(
                str(compressed.plan and compressed.plan.model_dump_json())
            )
            (folder / "network.json").write_text(compressed.network.model_dump_json())
        network = Network.model_validate_json((folder / "network.json").read_text())
        plan = Plan.model_validate_json((folder / "plan.json").read_text())
        result = Model(load(DCNv2, network, folder), DCNv2, network, plan)
    return result


def load_arrays(split: Split, rows: int | None = None) -> tuple[Arrays, NDArray[Any]]:
    """Load inputs and labels of a split, or of its first ``rows`` rows."""
    inputs, label = load_split(split)
    return {name: ids[:rows].numpy() for name, ids in inputs.items()}, label[:rows].numpy()


def write_graph(model: Model, bench: Bench, path: Path) -> Path:
    """Write a model's graph for ONNX Runtime unless ``path`` exists."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lower(model.module, served_graphs(bench.signature)[0], "onnxruntime", path)
    return path


def evaluate_auc(path: Path, split: Split) -> float:
    """Return the AUC of a graph on the rows of a split."""
    inputs, label = load_arrays(split)
    return point_estimates.auc(label, Session(path, THREADS).scores(inputs))


def initializer_bytes(path: Path) -> int:
    """Return the bytes of all initializers of a graph."""
    graph = onnx.load(path).graph
    return sum(onnx.numpy_helper.to_array(item).nbytes for item in graph.initializer)


def build_graphs(seed: int, folder: Path, cache: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield the original network and every compressed one: name, graph and bytes of all tensors."""
    model, bench = load_baseline(NAME, seed, folder, cache)
    splits, _ = prepare_splits(NAME, folder, cache)
    # Steps that calibrate use training rows, since Frappe has no calibration split.
    bench = bench.model_copy(update={"calibration": splits["train"]})
    run_folder = cache / NAME / f"seed{seed}" / "whole"
    source = write_graph(model, bench, run_folder / "fp32.onnx")
    yield "as trained", source, stored_bytes(model.module)
    rows, _ = load_arrays(splits["train"], CALIBRATION_ROWS)
    for name, quantize in PEERS:
        path = run_folder / f"{name}.onnx"
        if not path.is_file():
            try:
                quantize(source, path, rows)
            except ImportError:
                print(f"skipped {name}: not installed", file=sys.stderr)
                continue
        yield name, path, initializer_bytes(path)
    for name, steps in RECIPES:
        result = run_recipe(steps, model, bench, run_folder)
        path = write_graph(result, bench, run_folder / f"{digest(steps)[:16]}.onnx")
        yield name, path, stored_bytes(result.module)


def measure_network(
    seed: int, folder: Path, cache: Path
) -> dict[str, tuple[float, float, float, float]]:
    """Build and evaluate all graphs of one network.

    AUCs are stored next to the graphs, so that an interrupted run can be continued.

    Returns:
        By name of the graph: how many times smaller its tensors and its file are than the
        original's, and the losses of AUC on validation and test rows.
    """
    splits, _ = prepare_splits(NAME, folder, cache)
    results: dict[str, tuple[float, float, float, float]] = {}
    original: tuple[int, int, float, float] | None = None
    for name, path, size in build_graphs(seed, folder, cache):
        auc_file = path.with_suffix(".json")
        if not auc_file.is_file():
            aucs = [evaluate_auc(path, splits[part]) for part in ("validation", "test")]
            auc_file.write_text(json.dumps(aucs))
        validation, test = json.loads(auc_file.read_text())
        current = (size, path.stat().st_size, validation, test)
        original = original or current
        results[name] = (
            original[0] / current[0],
            original[1] / current[1],
            original[2] - current[2],
            original[3] - current[3],
        )
        print(seed, name, *(f"{value:.5f}" for value in results[name]), file=sys.stderr, flush=True)
    return results


def print_sizes(seeds: int, folder: Path, cache: Path) -> dict[str, list[tuple[float, ...]]]:
    """Print the table of sizes and losses; return by line the results of all networks."""
    by_seed = [measure_network(seed, folder, cache) for seed in range(seeds)]
    print(f"\n{NAME}, {seeds} networks\n")
    print("| | smaller | file smaller | loss of AUC, test rows | validation rows |")
    print("|---|---|---|---|---|")
    results = {}
    for name in by_seed[0]:
        values = [seed[name] for seed in by_seed]
        cells = [f"{mean(value[column] for value in values):.1f}x" for column in (0, 1)]
        for column in (3, 2):
            losses = [value[column] for value in values]
            cells.append(f"{mean(losses):.5f} ± {compute_interval_half_width(losses):.5f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        results[name] = values
    return results


def print_speeds(folder: Path, cache: Path) -> None:
    """Print the latency of the first network's graphs and the speed-up over float32."""
    splits, _ = prepare_splits(NAME, folder, cache)
    graphs = [(name, path) for name, path, _ in build_graphs(0, folder, cache)]
    print_latencies(
        [name for name, _ in graphs],
        [path for _, path in graphs],
        load_arrays(splits["test"], 256)[0],
    )


def measure_medians_ms(sessions: list[Session], inputs: Arrays, calls: int) -> list[float]:
    """Return the median latency of each session in milliseconds.

    In each round, every session runs a block of ``calls`` calls, so that other load affects all
    sessions. Sessions do not alternate after every call: the threads of a session keep spinning
    after a call, and on two cores they would slow down the next session.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for session, samples in zip(sessions, times, strict=True):
            time.sleep(0.1)
            (block,) = measure_interleaved_ms([session], inputs, calls, warmup=calls // 8)
            samples += block.tolist()
    return [float(np.median(samples)) for samples in times]


def print_latencies(names: list[str], paths: list[Path], rows: Arrays) -> None:
    """Print the median latency of each graph and its speed-up over the first graph."""
    sessions = [Session(path, THREADS) for path in paths]
    print(
        f"\n{HOST.processor}, {'with' if HOST.int8_dot else 'without'} int8 dot products, "
        f"{HOST.runtime} {HOST.version}, {THREADS} threads; p50 in milliseconds, times faster than "
        f"the first\n"
    )
    print("| | " + " | ".join(f"B={size}" for size in CALLS) + " |")
    print("|---" * (len(CALLS) + 1) + "|")
    columns = []
    for size in CALLS:
        inputs = {name: ids[:size] for name, ids in rows.items()}
        medians = measure_medians_ms(sessions, inputs, CALLS[size])
        columns.append([f"{value:.4f} ({medians[0] / value:.2f}x)" for value in medians])
    for name, *cells in zip(names, *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def draw(results: dict[str, list[tuple[float, ...]]], path: Path) -> None:
    """Plot the loss of AUC against the size ratio, for recpress and for the peers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6.5, 4.2))
    peers = {name for name, _ in PEERS}
    for label, marker, colour, names in (
        ("recpress", "o", "black", [n for n in results if n not in peers and n != "as trained"]),
        ("post-training int8", "s", "tab:blue", [n for n in results if n in peers]),
    ):
        points = sorted((mean(v[0] for v in results[n]), [v[3] for v in results[n]]) for n in names)
        panel.errorbar(
            [ratio for ratio, _ in points],
            [mean(losses) for _, losses in points],
            yerr=[compute_interval_half_width(losses) for _, losses in points],
            label=label,
            marker=marker,
            color=colour,
            linestyle="-" if label == "recpress" else "none",
            capsize=2,
        )
    panel.axhline(GOAL, color="black", linewidth=0.7, linestyle=":")
    panel.axhline(0, color="grey", linewidth=0.5)
    panel.set_xscale("log")
    ticks = (1, 2, 4, 10, 20, 40, 60)
    panel.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    panel.set_title("DCN-v2 on Frappe, tables and dense layers")
    panel.set_xlabel("times smaller")
    panel.set_ylabel("loss of AUC on test rows")
    panel.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table of sizes, or with ``--speed`` the table of latencies."""
    parser = create_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path, help="file for a plot of the table of sizes")
    parser.add_argument("--speed", action="store_true", help="measure latency instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = args.cache or default_cache()
    try:
        folder = data_folder(args.data)
    except DataMissing as error:
        sys.exit(str(error))
    if args.speed:
        print_speeds(folder, cache)
        return
    results = print_sizes(args.seeds, folder, cache)
    if args.picture is not None:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
