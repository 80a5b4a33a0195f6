"""Is the peak memory that ``recpress explain`` tells the one that a run takes?

A click model of one large table and one small layer is packed and compressed in a process of its
own, once for every size; the process's largest resident set is compared with the estimate that
was made before. ``tasks/memory.py`` takes its numbers from here.

    python -m benchmarks.peak_memory
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DIM, FIELDS = 64, 20
CASES = (  # rows of the table, training rows, preset, engine
    (10_000, 20_000, "fast", False),
    (1_000_000, 20_000, "fast", False),
    (2_000_000, 20_000, "small", False),
    (10_000, 2_000_000, "small", False),
    (1_000_000, 20_000, "fast", True),
)


class Clicks(nn.Module):
    """A table, some numbers, two layers."""

    def __init__(self, rows: int, hidden: int = 32) -> None:
        super().__init__()
        self.item = nn.Embedding(rows, DIM)
        self.first = nn.Linear(DIM + FIELDS, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, item: Tensor, dense: Tensor) -> Tensor:
        """Logits ``(rows,)`` of ids ``(rows,)`` and numbers ``(rows, FIELDS)``."""
        x = torch.relu(self.first(torch.cat([self.item(item), dense], dim=1)))
        logit: Tensor = self.out(x).squeeze(1)
        return logit


def write(folder: Path, rows: int, train: int) -> None:
    """A draft whose labels the network itself gave."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = Clicks(rows)
    draw = np.random.default_rng(0)
    for split, count in {"train": train, "validation": 2000, "test": 5000}.items():
        item = draw.integers(0, rows, count)
        dense = draw.normal(size=(count, FIELDS)).astype(np.float32)
        with torch.no_grad():
            logit = model(torch.from_numpy(item), torch.from_numpy(dense)).numpy()
        label = (draw.random(count) < 1 / (1 + np.exp(-4 * logit))).astype(np.int64)
        columns = {"item": item, "label": label}
        columns |= {f"d{place}": dense[:, place] for place in range(FIELDS)}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    save_file(model.state_dict(), folder / "model.safetensors")
    numbers = [f"d{place}" for place in range(FIELDS)]
    described = {
        "schema_version": 1,
        "name": "large",
        "version": "1",
        "signature": {
            "task": "ctr",
            "inputs": [
                {"kind": "id", "name": "item", "table": "item"},
                {"kind": "dense", "name": "dense", "columns": numbers, "shape": [FIELDS]},
            ],
            "output": "logit",
            "label": "label",
            "metric": "auc",
        },
        "network": {
            "architecture": {"path": "benchmarks.peak_memory:Clicks", "config": {"rows": rows}}
        },
        "data": {split: f"{split}.parquet" for split in ("train", "validation", "test")},
    }
    (folder / "model.json").write_text(json.dumps(described))


def carry_out(preset: str, *, engine: bool) -> None:
    """Run the order in this process and print what was foretold and what it took, in bytes."""
    from compressors.contracts import Limit
    from flows import console
    from flows.explain import explain
    from flows.terms import Targets, Terms

    order = Terms.model_validate(
        {
            "model": "large@1",
            "preset": preset,
            "limits": (Limit.parse("auc vs baseline >= -0.4"),),
            "targets": Targets(tensorrt_rtx="required" if engine else "off"),
        }
    )
    foretold = explain(order).memory
    console.run(order, quiet=True)
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"foretold": foretold.model_dump(), "took": took}))


def main() -> None:
    """Print one line a case, as a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inside", nargs=2, metavar=("PRESET", "ENGINE"), help=argparse.SUPPRESS)
    inside = parser.parse_args().inside
    if inside:
        carry_out(inside[0], engine=inside[1] == "True")
        return
    print("| table rows | training rows | preset | engine | foretold MiB | took MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for rows, train, preset, engine in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch) / "draft", rows, train)
            environ = {
                **os.environ,
                "RECPRESS_HOME": f"{scratch}/recpress",
                "PREFECT_HOME": f"{scratch}/prefect",
                "RECPRESS_ALLOWED_MODULES": "benchmarks",
            }
            pack = [sys.executable, "-m", "flows.cli", "bundle", "pack", f"{scratch}/draft"]
            subprocess.run(pack, env=environ, check=True, stdout=subprocess.DEVNULL)
            again = [
                sys.executable,
                "-m",
                "benchmarks.peak_memory",
                "--inside",
                preset,
                str(engine),
            ]
            ran = subprocess.run(again, env=environ, check=True, capture_output=True, text=True)
            found = json.loads(ran.stdout.splitlines()[-1])
            foretold, took = found["foretold"]["peak"] / 2**20, found["took"] / 2**20
            print(
                f"| {rows:,} | {train:,} | {preset} | {'yes' if engine else 'no'} | "
                f"{foretold:,.0f} | {took:,.0f} | {foretold / took:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
