"""A click model of Criteo's size, served: 26 fields of 64 numbers, then 512, 256, and the score.

Nothing is trained: what counts is time. Float32, onnxruntime's and ModelOpt's int8, and ours, all
of the same network, measured in turn in one process.

    python -m benchmarks.wide_tower
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.ctr import signature
from benchmarks.whole_model import PEERS, STEPS, arrays, timed
from compressors.contracts import Architecture, Bench, Network, Split
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from examples.dcnv2 import DCNv2

FIELDS = {f"c{number}": 10_000 for number in range(26)}
ROWS = 4096
TABLES = {"kind": "rowwise_int8"}
RECIPES = {
    "ours: int8 tables and layers": [TABLES, {"kind": "static_int8"}],
    "ours: int8 tables, int8 weights alone": [TABLES, {"kind": "weight_int8"}],
    "ours: int8 tables, int4 weights alone": [
        TABLES,
        {"kind": "weight_int4", "block": 128, "activations": "int8"},
    ],
}


def network() -> Model:
    """The network with weights from a seed."""
    config = {
        "fields": [{"name": name, "rows": rows} for name, rows in FIELDS.items()],
        "dim": 64,
        "cross_layers": 0,
        "hidden": [512, 256],
        "structure": "stacked",
    }
    torch.manual_seed(0)
    module = DCNv2(**config).eval()
    built = Architecture(path="examples.dcnv2:DCNv2", config=config)
    return Model(module, DCNv2, Network(architecture=built))


def drawn(folder: Path) -> Split:
    """Rows of ids drawn evenly."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    held = {
        name: torch.randint(rows, (ROWS,), generator=generator) for name, rows in FIELDS.items()
    }
    save_file({**held, "@label": torch.zeros(ROWS)}, folder / "data.safetensors")
    return Split(path=str(folder), sha256="0" * 64, rows=ROWS)


def main() -> None:
    """Print one line a form."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        split = drawn(place / "rows")
        bench = Bench(signature=signature(FIELDS), calibration=split)
        model = network()
        form = served_graphs(bench.signature)[0]
        names, paths = ["float32"], [place / "fp32.onnx"]
        lower(model.module, form, "onnxruntime", paths[0])
        rows, _ = arrays(split)
        for name, quantize in PEERS:
            made = place / f"{name}.onnx"
            try:
                quantize(paths[0], made, rows)
            except ImportError:
                print(f"{name} is not installed: left out")
                continue
            names.append(name)
            paths.append(made)
        for name, recipe in RECIPES.items():
            made = model
            for number, step in enumerate(STEPS.validate_python(recipe)):
                made = run(step, made, bench, place / name / str(number))
            names.append(name)
            paths.append(place / f"{name}.onnx")
            lower(made.module, form, "onnxruntime", paths[-1])
        timed(names, paths, {name: np.ascontiguousarray(ids[:256]) for name, ids in rows.items()})


if __name__ == "__main__":
    main()
