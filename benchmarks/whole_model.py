"""How small and how fast does a whole click model become, tables and dense layers together?

The tuned DCN-v2 of ``benchmarks/ctr.py`` on Frappe, 1.8 MB, 87 % of it dense. Ours are recipes of
steps on the trained network; peers quantize the same network's ONNX graph after training: ONNX
Runtime's ``quantize_dynamic`` and ``quantize_static`` (with and without its tables), and NVIDIA
ModelOpt where it is installed (``nvidia-modelopt onnx-graphsurgeon polygraphy cppimport lief
onnxslim onnxconverter-common``; its extra ``onnx`` asks for other versions than ours). Everything
is judged as it is served, a graph in ONNX Runtime. Loss is the network's own AUC on test rows minus
that of its compressed self, mean and Student's 95 % interval over networks of different seeds.
Bytes are those of all stored tensors; those of the graph's file stand beside them. Recipes were
chosen on validation rows. Latency is that of calls on inputs that lie ready in the runtime.

    python -m benchmarks.whole_model --seeds 5 --picture docs/pictures/whole_model.png
    python -m benchmarks.whole_model --speed     # latency of the first network's graphs, in turn
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
from pydantic import TypeAdapter

from benchmarks.ctr import (
    DataMissing,
    arguments,
    baseline,
    data_folder,
    default_cache,
    interval,
    prepared,
    tensors,
)
from compressors.contracts import Bench, Network, Plan, Split, digest
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.core.state.module_state import load
from compressors.core.units import stored_bytes
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.metrics import point_estimates
from examples.dcnv2 import DCNv2
from infra.onnxruntime.sessions import Session, interleaved_ms, machine

STEPS = TypeAdapter(tuple[AnyStep, ...])
Steps = list[dict[str, Any]]
Arrays = dict[str, NDArray[Any]]
Peer = Callable[[Path, Path, Arrays], None]

NAME = "frappe"
CALIBRATION_ROWS = 4096
# A block is long enough for its median to be that of calls that follow each other, as under load.
ROUNDS, CALLS = 10, {1: 400, 256: 40}
THREADS = 2


def student(hidden: list[int], cross: int, dropout: float) -> dict[str, Any]:
    """A smaller network of the same kind, taught by the original and trained as that was."""
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


LAYERS: Steps = [{"kind": "fold"}, {"kind": "static_int8"}]
SMALL = ("tables.daytime", "tables.weekday", "tables.isweekend", "tables.homework")
TINY = {
    "kind": "kmeans",
    "bits": 2,
    "scale": "none",
    "tables": (*SMALL, "tables.cost", "tables.weather"),
}


def codes(item: int, user: int, place: int = 2) -> Steps:
    """Codes of 4 bits for the large fields: how many a row; 2 bits a weight for the tiny ones."""
    return [
        TINY,
        *(
            {"kind": "additive_codes", "codebooks": count, "rounds": 60, "tables": names}
            for count, names in (
                (item, ("tables.item",)),
                (user, ("tables.user",)),
                (place, ("tables.country", "tables.city")),
            )
        ),
    ]


def ranks(most_error: float) -> dict[str, Any]:
    """Dense layers of as low a rank as loses that share of their outputs' squared size."""
    return {"kind": "low_rank_dense", "most_error": most_error}


INT4: Steps = [{"kind": "rowwise_int4", "clipping": "least_squares"}]
LAYERS_INT4: Steps = [{"kind": "fold"}, {"kind": "weight_int4", "block": 0}]
STUDENT = student([200, 200], 3, 0.3)
OURS: list[tuple[str, Steps]] = [
    ("int8 tables and layers", [{"kind": "rowwise_int8"}, *LAYERS]),
    ("student 200-200, int4 tables, int8 layers", [STUDENT, *INT4, *LAYERS]),
    ("the same, layers of low rank (2 %)", [STUDENT, ranks(0.02), *INT4, *LAYERS]),
    ("the same, 3 %", [STUDENT, ranks(0.03), *INT4, *LAYERS]),
    ("the same, 8 and 6 codes a row", [STUDENT, ranks(0.03), *codes(8, 6), *LAYERS]),
    ("the same, int4 layers", [STUDENT, ranks(0.03), *codes(8, 6), *LAYERS_INT4]),
    ("the same, 5 %, 6 and 6 codes", [STUDENT, ranks(0.05), *codes(6, 6), *LAYERS_INT4]),
    ("the same, 8 %, 4 and 4 codes", [STUDENT, ranks(0.08), *codes(4, 4), *LAYERS_INT4]),
]


# --- peers -----------------------------------------------------------------------------------


class _Reader:
    """Calibration rows, one batch."""

    def __init__(self, rows: Arrays) -> None:
        self._left: Iterator[Arrays] = iter([rows])

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


def dynamic(source: Path, made: Path, rows: Arrays) -> None:  # noqa: ARG001
    """ONNX Runtime's dynamic quantization: int8 weights, inputs rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    narrow = not machine(THREADS).int8_dot  # else products saturate without VNNI
    quantize_dynamic(
        source, made, weight_type=QuantType.QInt8, per_channel=True, reduce_range=narrow
    )


def static(*operators: str) -> Peer:
    """ONNX Runtime's static quantization, of some operators or of all it knows."""

    def quantize(source: Path, made: Path, rows: Arrays) -> None:
        from onnxruntime.quantization import QuantType, quantize_static

        quantize_static(
            source,
            made,
            _Reader(rows),
            op_types_to_quantize=list(operators) or None,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=not machine(THREADS).int8_dot,  # else products saturate without VNNI
        )

    return quantize


def modelopt(source: Path, made: Path, rows: Arrays) -> None:
    """NVIDIA ModelOpt's ONNX quantization to int8."""
    from modelopt.onnx.quantization import quantize

    with contextlib.redirect_stdout(sys.stderr):  # its calibration reports to stdout
        quantize(
            str(source),
            quantize_mode="int8",
            calibration_data=rows,
            # Without shapes it takes a batch for one row, and leaves all products alone.
            calibration_shapes=",".join(f"{name}:{len(ids)}" for name, ids in rows.items()),
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",  # CPUs have no float16 products
            dq_only=True,  # or weights are stored as float32, with a QuantizeLinear behind
            output_path=str(made),
            log_level="ERROR",
        )


PEERS: list[tuple[str, Peer]] = [
    ("quantize_dynamic", dynamic),
    ("quantize_static, all of it", static()),
    ("quantize_static, Gemm only", static("Gemm", "MatMul")),
    ("ModelOpt int8", modelopt),
]


# --- one network -----------------------------------------------------------------------------


def carried_out(steps: Steps, model: Model, bench: Bench, place: Path) -> Model:
    """The result of a recipe; that of each beginning of it is kept and found again."""
    made = model
    for number, step in enumerate(STEPS.validate_python(steps), 1):
        folder = place / f"recipe-{digest(steps[:number])[:16]}"
        if not (folder / "network.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            found = run(step, made, bench, folder)
            (folder / "plan.json").write_text(str(found.plan and found.plan.model_dump_json()))
            (folder / "network.json").write_text(found.network.model_dump_json())
        network = Network.model_validate_json((folder / "network.json").read_text())
        plan = Plan.model_validate_json((folder / "plan.json").read_text())
        made = Model(load(DCNv2, network, folder), DCNv2, network, plan)
    return made


def arrays(split: Split, rows: int | None = None) -> tuple[Arrays, NDArray[Any]]:
    """Inputs and labels of a split, or of its first rows."""
    inputs, label = tensors(split)
    return {name: ids[:rows].numpy() for name, ids in inputs.items()}, label[:rows].numpy()


def served(model: Model, bench: Bench, path: Path) -> Path:
    """A model's graph for ONNX Runtime, written once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lower(model.module, served_graphs(bench.signature)[0], "onnxruntime", path)
    return path


def auc_of(path: Path, split: Split) -> float:
    """AUC of a graph on the rows of a split."""
    inputs, label = arrays(split)
    return point_estimates.auc(label, Session(path, THREADS).scores(inputs))


def initializer_bytes(path: Path) -> int:
    """Bytes of all tensors that a graph holds."""
    graph = onnx.load(path).graph
    return sum(onnx.numpy_helper.to_array(item).nbytes for item in graph.initializer)


def graphs_of(seed: int, folder: Path, cache: Path) -> Iterator[tuple[str, Path, int]]:
    """Name, graph and stored bytes of every line of the table, beginning with the original's."""
    model, bench = baseline(NAME, seed, folder, cache)
    splits, _ = prepared(NAME, folder, cache)
    # Whoever calibrates without rows of its own does so on those it was trained on.
    bench = bench.model_copy(update={"calibration": splits["train"]})
    place = cache / NAME / f"seed{seed}" / "whole"
    source = served(model, bench, place / "fp32.onnx")
    yield "as trained", source, stored_bytes(model.module)
    rows, _ = arrays(splits["train"], CALIBRATION_ROWS)
    for name, quantize in PEERS:
        made = place / f"{name}.onnx"
        if not made.is_file():
            try:
                quantize(source, made, rows)
            except ImportError:
                print(f"{name} is not installed: left out", file=sys.stderr)
                continue
        yield name, made, initializer_bytes(made)
    for name, steps in OURS:
        ours = carried_out(steps, model, bench, place)
        path = served(ours, bench, place / f"{digest(steps)[:16]}.onnx")
        yield name, path, stored_bytes(ours.module)


def losses_of(seed: int, folder: Path, cache: Path) -> dict[str, tuple[float, float, float, float]]:
    """By line: how many times smaller (tensors, file), and losses on validation and test rows.

    What was measured is kept, so that a run that was cut off goes on.
    """
    splits, _ = prepared(NAME, folder, cache)
    found: dict[str, tuple[float, float, float, float]] = {}
    before: tuple[int, int, float, float] | None = None
    for name, path, size in graphs_of(seed, folder, cache):
        kept = path.with_suffix(".json")
        if not kept.is_file():
            aucs = [auc_of(path, splits[part]) for part in ("validation", "test")]
            kept.write_text(json.dumps(aucs))
        validation, test = json.loads(kept.read_text())
        now = (size, path.stat().st_size, validation, test)
        before = before or now
        found[name] = (
            before[0] / now[0],
            before[1] / now[1],
            before[2] - now[2],
            before[3] - now[3],
        )
        print(seed, name, *(f"{value:.5f}" for value in found[name]), file=sys.stderr, flush=True)
    return found


def sizes(seeds: int, folder: Path, cache: Path) -> dict[str, list[tuple[float, ...]]]:
    """Print what every line keeps and loses; by line the numbers of every network."""
    every = [losses_of(seed, folder, cache) for seed in range(seeds)]
    print(f"\n{NAME}, {seeds} networks\n")
    print("| | smaller | file smaller | loss of AUC, test rows | validation rows |")
    print("|---|---|---|---|---|")
    found = {}
    for name in every[0]:
        values = [seed[name] for seed in every]
        cells = [f"{mean(value[place] for value in values):.1f}x" for place in (0, 1)]
        for place in (3, 2):
            losses = [value[place] for value in values]
            cells.append(f"{mean(losses):.5f} ± {interval(losses):.5f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        found[name] = values
    return found


def speed(folder: Path, cache: Path) -> None:
    """Print latency of the first network's graphs as shares of the float32 graph's."""
    splits, _ = prepared(NAME, folder, cache)
    named = [(name, path) for name, path, _ in graphs_of(0, folder, cache)]
    timed([name for name, _ in named], [path for _, path in named], arrays(splits["test"], 256)[0])


def medians_ms(sessions: list[Session], asked: Arrays, calls: int) -> list[float]:
    """Median latency of each session: blocks of calls in turn, so that all see the same machine.

    Not call by call: a session's threads go on spinning for a while after it has answered, and on
    two cores they would be counted against the next one.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for session, own in zip(sessions, times, strict=True):
            time.sleep(0.1)
            (found,) = interleaved_ms([session], asked, calls, warmup=calls // 8)
            own += found.tolist()
    return [float(np.median(own)) for own in times]


def timed(names: list[str], paths: list[Path], rows: Arrays) -> None:
    """Print each graph's median latency beside the first's, all measured in turn."""
    sessions = [Session(path, THREADS) for path in paths]
    here = machine(THREADS)
    print(
        f"\n{here.processor}, {'with' if here.int8_dot else 'without'} int8 dot products, ONNX "
        f"Runtime {here.onnxruntime}, {THREADS} threads; p50 in milliseconds, times faster than "
        f"the first\n"
    )
    print("| | " + " | ".join(f"B={size}" for size in CALLS) + " |")
    print("|---" * (len(CALLS) + 1) + "|")
    columns = []
    for size in CALLS:
        asked = {name: ids[:size] for name, ids in rows.items()}
        medians = medians_ms(sessions, asked, CALLS[size])
        columns.append([f"{value:.4f} ({medians[0] / value:.2f}x)" for value in medians])
    for name, *cells in zip(names, *columns, strict=True):
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def draw(found: dict[str, list[tuple[float, ...]]], place: Path) -> None:
    """Loss of AUC against how many times smaller, ours beside the peers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6.5, 4.2))
    peers = {name for name, _ in PEERS}
    for label, marker, colour, mine in (
        ("recpress", "o", "black", [n for n in found if n not in peers and n != "as trained"]),
        ("post-training int8", "s", "tab:blue", [n for n in found if n in peers]),
    ):
        points = sorted((mean(v[0] for v in found[n]), [v[3] for v in found[n]]) for n in mine)
        panel.errorbar(
            [times for times, _ in points],
            [mean(losses) for _, losses in points],
            yerr=[interval(losses) for _, losses in points],
            label=label,
            marker=marker,
            color=colour,
            linestyle="-" if label == "recpress" else "none",
            capsize=2,
        )
    panel.axhline(0.0005, color="black", linewidth=0.7, linestyle=":")
    panel.axhline(0, color="grey", linewidth=0.5)
    panel.set_xscale("log")
    ticks = (1, 2, 4, 10, 20, 40, 60)
    panel.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    panel.set_title("DCN-v2 on Frappe, tables and dense layers")
    panel.set_xlabel("times smaller")
    panel.set_ylabel("loss of AUC on test rows")
    panel.legend()
    figure.tight_layout()
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=110)


def main() -> None:
    """Print the tables; draw the first if asked to."""
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", type=Path, help="where the picture is written")
    parser.add_argument("--speed", action="store_true", help="measure latency instead")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cache = asked.cache or default_cache()
    try:
        folder = data_folder(asked.data)
    except DataMissing as fault:
        sys.exit(str(fault))
    if asked.speed:
        speed(folder, cache)
        return
    found = sizes(asked.seeds, folder, cache)
    if asked.picture is not None:
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
