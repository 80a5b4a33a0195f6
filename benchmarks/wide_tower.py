"""How fast is a click model of Criteo's size: 26 fields of dim 64, hidden layers of 512 and 256?

Only latency is measured, so the network is untrained. It is compared in float32, in int8 of ONNX
Runtime's and ModelOpt's quantizers, and after recipes of recpress ("ours"), interleaved in one
process.

    python -m benchmarks.wide_tower
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.ctr import build_signature
from benchmarks.table_front import RECIPE_ADAPTER
from benchmarks.whole_model import PEERS, load_arrays, print_latencies
from compressors.contracts import Architecture, Bench, Network, Split
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from examples.dcnv2 import DCNv2

FIELDS = {f"c{number}": 10_000 for number in range(26)}  # rows of each field's table
ROWS = 4096  # calibration rows
INT8_TABLES = {"kind": "rowwise_int8"}
RECIPES = {
    "ours: int8 tables and layers": [INT8_TABLES, {"kind": "static_int8"}],
    "ours: int8 tables, int8 weights, inputs quantized at run time": [
        INT8_TABLES,
        {"kind": "weight_int8"},
    ],
    "ours: int8 tables, int4 weights, inputs quantized at run time": [
        INT8_TABLES,
        {"kind": "weight_int4", "block": 128, "activations": "int8"},
    ],
}


def build_network() -> Model:
    """Return the network with random weights from a fixed seed."""
    config = {
        "fields": [{"name": name, "rows": rows} for name, rows in FIELDS.items()],
        "dim": 64,
        "cross_layers": 0,
        "hidden": [512, 256],
        "structure": "stacked",
    }
    torch.manual_seed(0)
    module = DCNv2(**config).eval()
    arch = Architecture(path="examples.dcnv2:DCNv2", config=config)
    return Model(module, DCNv2, Network(architecture=arch))


def write_rows(folder: Path) -> Split:
    """Write rows of uniformly drawn ids as a prepared split."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    ids = {name: torch.randint(rows, (ROWS,), generator=generator) for name, rows in FIELDS.items()}
    save_file({**ids, "@label": torch.zeros(ROWS)}, folder / "data.safetensors")
    return Split(path=str(folder), sha256="0" * 64, rows=ROWS)  # the hash is not checked here


def main() -> None:
    """Print a Markdown table with one line per network."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        split = write_rows(folder / "rows")
        bench = Bench(signature=build_signature(FIELDS), calibration=split)
        model = build_network()
        graph = served_graphs(bench.signature)[0]
        names, paths = ["float32"], [folder / "fp32.onnx"]
        lower(model.module, graph, "onnxruntime", paths[0])
        rows, _ = load_arrays(split)
        for name, quantize in PEERS:
            path = folder / f"{name}.onnx"
            try:
                quantize(paths[0], path, rows)
            except ImportError:
                print(f"skipped {name}: not installed")
                continue
            names.append(name)
            paths.append(path)
        for name, recipe in RECIPES.items():
            compressed = model
            for number, step in enumerate(RECIPE_ADAPTER.validate_python(recipe)):
                compressed = run(step, compressed, bench, folder / name / str(number))
            names.append(name)
            paths.append(folder / f"{name}.onnx")
            lower(compressed.module, graph, "onnxruntime", paths[-1])
        print_latencies(
            names, paths, {name: np.ascontiguousarray(ids[:256]) for name, ids in rows.items()}
        )


if __name__ == "__main__":
    main()
