"""How fast are the graphs of the preset ``fast``, compared with float32 and with other quantizers?

Only latency is measured, so the networks are untrained. Each network is compared in float32, in
int8 of other tools ("peers"), and after the steps of ``fast``: as medians of blocks of calls, which
are interleaved, with inputs that are already bound (IO binding). Ratios are those of float32 in
ONNX Runtime in the same run.

    python -m benchmarks.latency [perceptron-16 dcn-v2 ...] [--threads 1 2]

Peers that are not installed are skipped. ``benchmarks/whole_model.py`` says what ModelOpt needs;
NNCF needs ``openvino`` and ``nncf``.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.ctr import build_signature
from benchmarks.whole_model import PEERS
from compressors.contracts import Architecture, Bench, Network, Signature, Split
from compressors.core.model import Model
from compressors.core.modules.pointwise import replace_pointwise_convs
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from examples.dcnv2 import DCNv2
from examples.deepfm import DeepFM
from examples.dlrm import DLRM
from examples.frappe import FIELDS as FRAPPE
from examples.xdeepfm import XDeepFM
from flows.presets import PRESETS
from infra.errors.runtimes import ScoringFailed
from infra.onnxruntime.sessions import OnnxRuntime, Session
from infra.timing import describe_machine

Inputs = dict[str, NDArray[Any]]
Call = Callable[[], object]

CALLS = {1: 200, 64: 40, 1024: 6}
"""Batch size -> consecutive calls of one session in a block."""
BLOCKS = 25
CRITEO = {f"c{number}": 10_000 for number in range(26)}
CALIBRATION_ROWS = 4096
OURS, NNCF = "recpress, preset fast", "NNCF int8 in OpenVINO"


@dataclass(frozen=True)
class Case:
    """An untrained network of one id per field.

    Attributes:
        network: its class, an example of recpress.
        fields: number of table rows by field.
        options: other arguments of the class.
    """

    network: type[nn.Module]
    fields: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        """The inputs and the output of the network."""
        signature = build_signature(dict(self.fields))
        if self.network not in (DeepFM, XDeepFM):
            return signature
        inputs = [
            item.model_copy(update={"more_tables": (f"linear.{item.name}",)})
            for item in signature.inputs
        ]
        return signature.model_copy(update={"inputs": tuple(inputs)})

    def rows_of_tables(self) -> dict[str, int]:
        """Return the number of rows by table name."""
        return {
            f"{part}.{name}": rows
            for part in ("tables", "linear")
            for name, rows in self.fields.items()
        }

    def build(self) -> Model:
        """Return the network with random weights from a fixed seed."""
        fields = [{"name": name, "rows": rows} for name, rows in self.fields.items()]
        config = {"fields": fields, **self.options}
        torch.manual_seed(0)
        module = replace_pointwise_convs(self.network(**config)).eval()
        for part in module.modules():  # statistics of norms and widths of tables as after training
            if isinstance(part, nn.BatchNorm1d):
                nn.init.uniform_(part.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
                nn.init.uniform_(part.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.05)
        path = f"{self.network.__module__}:{self.network.__name__}"
        return Model(
            module, self.network, Network(architecture=Architecture(path=path, config=config))
        )


CASES = {
    "perceptron-16": Case(
        DCNv2, CRITEO, {"dim": 16, "cross_layers": 0, "hidden": [256, 128], "structure": "stacked"}
    ),
    "perceptron-64": Case(
        DCNv2, CRITEO, {"dim": 64, "cross_layers": 0, "hidden": [512, 256], "structure": "stacked"}
    ),
    "dcn-v2": Case(
        DCNv2,
        FRAPPE,
        {"dim": 10, "cross_layers": 3, "hidden": [400, 400, 400], "batch_norm": True},
    ),
    "deepfm": Case(DeepFM, FRAPPE, {"batch_norm": True}),
    "xdeepfm": Case(XDeepFM, FRAPPE, {"batch_norm": True}),
    "dlrm": Case(DLRM, FRAPPE, {"batch_norm": True}),
}


def write_rows(inputs: Mapping[str, Tensor], folder: Path) -> Split:
    """Write rows as a prepared split."""
    folder.mkdir(parents=True)
    labels = torch.zeros(CALIBRATION_ROWS)
    save_file({**inputs, "@label": labels}, folder / "data.safetensors")
    # The hash is not checked here.
    return Split(path=str(folder), sha256="0" * 64, rows=CALIBRATION_ROWS)


def write_graphs(case: Case, folder: Path) -> dict[str, Path]:
    """Write the graphs of a network: float32, those of the installed peers, and ours."""
    model, signature = case.build(), case.signature
    graph = served_graphs(signature)[0]
    source = folder / "float32.onnx"
    lower(model.module, graph, "onnxruntime", source)
    paths = {"float32": source}
    tensors = generate_inputs(signature, case.rows_of_tables(), CALIBRATION_ROWS)
    split = write_rows(tensors, folder / "rows")
    rows = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, quantize in PEERS:
        path = folder / f"{name}.onnx"
        try:
            quantize(source, path, rows)
        except ImportError:
            print(f"skipped {name}: not installed")
            continue
        paths[name] = path
    bench = Bench(signature=signature, calibration=split)
    for number, choice in enumerate(PRESETS["fast"]):
        for step in choice.options[0]:
            try:
                model = run(step, model, bench, folder / str(number))
            except NothingToCompress:
                continue
    paths[OURS] = folder / "ours.onnx"
    lower(model.module, graph, "onnxruntime", paths[OURS])
    return paths


def quantize_with_nncf(source: Path, case: Case) -> Any:
    """Quantize a graph with NNCF.

    Raises:
        ImportError: OpenVINO or NNCF is not installed.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    batches = []
    for seed in range(40):
        tensors = generate_inputs(case.signature, case.rows_of_tables(), 64, seed)
        batches.append({name: tensor.numpy() for name, tensor in tensors.items()})
    return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))


def bind_in_openvino(model: Any, inputs: Inputs, threads: int) -> Call:
    """Return a call of an OpenVINO model with inputs that are bound."""
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    for name, values in inputs.items():
        request.set_tensor(name, openvino.Tensor(values))
    call: Call = request.infer
    return call


def measure(calls: Mapping[str, Call], count: int) -> dict[str, float]:
    """Return the median milliseconds of one call of each session, over interleaved blocks."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    for _ in range(BLOCKS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def print_case(name: str, case: Case, threads: int) -> None:
    """Print a Markdown table: one line per graph, one column per batch size."""
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_graphs(case, Path(scratch))
        openvino_models: dict[str, Any] = {}
        try:
            openvino_models[NNCF] = quantize_with_nncf(paths["float32"], case)
        except ImportError:
            print(f"skipped {NNCF}: not installed")
        cells: dict[str, list[str]] = {}
        for size, count in CALLS.items():
            tensors = generate_inputs(case.signature, case.rows_of_tables(), size)
            inputs = {key: np.ascontiguousarray(value.numpy()) for key, value in tensors.items()}
            calls: dict[str, Call] = {}
            for key, path in paths.items():
                try:
                    call = Session(path, threads).bind(inputs)
                    call()
                except ScoringFailed:
                    if key in ("float32", OURS):
                        raise
                    print(f"left out {key} for B={size}: its graph fails")
                    cells.setdefault(key, []).append("fails")
                    continue
                calls[key] = call
            for key, model in openvino_models.items():
                calls[key] = bind_in_openvino(model, inputs, threads)
            for key, value in measure(calls, count).items():
                cells.setdefault(key, []).append(f"{value:.4f}")
    print(f"\n{name}, p50 in ms and ratio to float32, {threads} thread(s)\n")
    print("| | " + " | ".join(f"B={size}" for size in CALLS) + " |")
    print("|---" * (len(CALLS) + 1) + "|")
    for key, values in cells.items():
        ratios = [
            value if value == "fails" else f"{value} ({float(value) / float(base):.2f}x)"
            for value, base in zip(values, cells["float32"], strict=True)
        ]
        print(f"| {key} | {' | '.join(ratios)} |", flush=True)


def main() -> None:
    """Measure the selected networks."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    options = parser.parse_args()
    if unknown := [name for name in options.networks if name not in CASES]:
        parser.error(f"expected networks of {', '.join(CASES)}, got {', '.join(unknown)}")
    for threads in options.threads:
        machine = describe_machine("ONNX Runtime", OnnxRuntime().version(), threads)
        dot = "with" if machine.int8_dot else "without"
        print(f"{machine.processor}, {dot} int8 dot products, {machine.runtime} {machine.version}")
        for name in options.networks or CASES:
            print_case(name, CASES[name], threads)


if __name__ == "__main__":
    main()
