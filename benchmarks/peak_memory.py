"""Is the peak memory that ``recpress explain`` estimates the one that a run uses?

Click and retrieval models of given sizes are packed and compressed, each in a process of its own.
A thread samples the process's resident set; its largest value, the anonymous part of it, and the
stage in which it was reached are compared with the estimate that was made before the run.
``tasks/orchestration/memory_estimate.py`` takes its factors from here.

    python -m benchmarks.peak_memory [--case NAME ...]
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DIM, FIELDS = 64, 20
KIB, MIB = 1024, 2**20


class Case(NamedTuple):
    """One model and order."""

    rows: int
    """Of the table, 64 float32 numbers each; of both tables for a retrieval model."""
    hidden: int
    """Width of three dense layers."""
    train: int
    """Training rows."""
    preset: str
    """With ``custom`` a step trains the tables."""
    engine: bool = False
    retrieval: bool = False


CASES = {
    "tiny": Case(10_000, 32, 20_000, "fast"),
    "table-100": Case(400_000, 32, 20_000, "fast"),
    "table-250": Case(1_000_000, 32, 20_000, "fast"),
    "table-500": Case(2_000_000, 32, 20_000, "fast"),
    "table-1000": Case(4_000_000, 32, 20_000, "fast"),
    "table-500-safe": Case(2_000_000, 32, 20_000, "safe"),
    "table-500-small": Case(2_000_000, 32, 20_000, "small"),
    "table-500-smallest": Case(2_000_000, 32, 20_000, "smallest"),
    "table-250-engine": Case(1_000_000, 32, 20_000, "safe", engine=True),
    "table-500-engine": Case(2_000_000, 32, 20_000, "safe", engine=True),
    "table-250-trained": Case(1_000_000, 32, 20_000, "custom"),
    "dense-35": Case(10_000, 2048, 20_000, "fast"),
    "dense-130": Case(10_000, 4096, 20_000, "fast"),
    "dense-300-safe": Case(10_000, 6144, 20_000, "safe"),
    "dense-300": Case(10_000, 6144, 20_000, "fast"),
    "dense-130-small": Case(10_000, 4096, 4_000, "small"),
    "dense-130-engine": Case(10_000, 4096, 20_000, "safe", engine=True),
    "rows-1m": Case(10_000, 32, 1_000_000, "fast"),
    "rows-2m": Case(10_000, 32, 2_000_000, "small"),
    "rows-4m": Case(10_000, 32, 4_000_000, "safe"),
    "towers-250": Case(500_000, 32, 20_000, "fast", retrieval=True),
    "towers-500": Case(1_000_000, 32, 20_000, "fast", retrieval=True),
    "towers-500-small": Case(1_000_000, 32, 20_000, "small", retrieval=True),
}


TRAINING_STEPS = (
    {"kind": "fine_tune", "training": {"tables": True, "epochs": 2}},
    {"kind": "rowwise_int8"},
)


class Clicks(nn.Module):
    """A table, some numbers, three layers."""

    def __init__(self, rows: int, hidden: int = 32) -> None:
        super().__init__()
        self.item = nn.Embedding(rows, DIM)
        self.first = nn.Linear(DIM + FIELDS, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, item: Tensor, dense: Tensor) -> Tensor:
        """Logits ``(rows,)`` of ids ``(rows,)`` and numbers ``(rows, FIELDS)``."""
        x = torch.relu(self.first(torch.cat([self.item(item), dense], dim=1)))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        logit: Tensor = self.out(x).squeeze(1)
        return logit


class Half(nn.Module):
    """A table and a layer: one tower."""

    def __init__(self, name: str, rows: int, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.table = nn.Embedding(rows, DIM)
        self.out = nn.Linear(DIM, hidden)

    def forward(self, **ids: Tensor) -> Tensor:
        """Vectors ``(rows, hidden)``."""
        vectors: Tensor = self.out(self.table(ids[self.name]))
        return vectors


class Towers(nn.Module):
    """A user's vector and an item's, and their dot product."""

    def __init__(self, rows: int, hidden: int = 32) -> None:
        super().__init__()
        self.query = Half("user", rows, hidden)
        self.found = Half("item", rows, hidden)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Scores ``(rows,)``."""
        return (self.query(user=user) * self.found(item=item)).sum(dim=1)


def write(folder: Path, case: Case) -> None:
    """Write a draft whose labels, or interactions, the network itself generated."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = Towers if case.retrieval else Clicks
    model = network(case.rows, case.hidden)
    described = _retrieval(folder, case) if case.retrieval else _clicks(folder, case, model)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"rows": case.rows, "hidden": case.hidden}
    path = f"benchmarks.peak_memory:{network.__name__}"
    described |= {
        "schema_version": 1,
        "name": "large",
        "version": "1",
        "network": {"architecture": {"path": path, "config": config}},
    }
    (folder / "model.json").write_text(json.dumps(described))


def _clicks(folder: Path, case: Case, model: nn.Module) -> dict[str, object]:
    draw = np.random.default_rng(0)
    splits = {"train": case.train, "validation": 2000, "test": 5000}
    for split, count in splits.items():
        item = draw.integers(0, case.rows, count)
        dense = draw.normal(size=(count, FIELDS)).astype(np.float32)
        scored = min(count, 20_000)  # the rest has labels drawn for size alone
        with torch.no_grad():
            logit = model(torch.from_numpy(item[:scored]), torch.from_numpy(dense[:scored])).numpy()
        logit = np.resize((logit - logit.mean()) / logit.std(), count)
        label = (draw.random(count) < 1 / (1 + np.exp(-2 * logit))).astype(np.int64)
        columns = {"item": item, "label": label}
        columns |= {f"d{place}": dense[:, place] for place in range(FIELDS)}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    numbers = [f"d{place}" for place in range(FIELDS)]
    signature = {
        "task": "ctr",
        "inputs": [
            {"kind": "id", "name": "item", "table": "item"},
            {"kind": "dense", "name": "dense", "columns": numbers, "shape": [FIELDS]},
        ],
        "output": "logit",
        "label": "label",
        "metric": "auc",
    }
    return {"signature": signature, "data": {split: f"{split}.parquet" for split in splits}}


def _retrieval(folder: Path, case: Case) -> dict[str, object]:
    draw = np.random.default_rng(0)
    splits = {"train": case.train, "validation": 500, "test": 1000}
    catalogue = min(case.rows, 20_000)
    for split, count in splits.items():
        user = draw.integers(0, min(case.rows, 300), count)
        columns = {"user": user, "item": draw.integers(0, catalogue, count)}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    pq.write_table(pa.table({"item": np.arange(catalogue)}), folder / "items.parquet")
    signature = {
        "task": "retrieval",
        "inputs": [
            {"kind": "id", "name": "user", "table": "query.table"},
            {"kind": "id", "name": "item", "table": "found.table"},
        ],
        "output": "score",
        "group": "user",
        "item": "item",
        "towers": {
            "query": {"module": "query", "inputs": ["user"]},
            "item": {"module": "found", "inputs": ["item"]},
        },
        "metric": "recall@20",
    }
    return {
        "signature": signature,
        "data": {split: f"{split}.parquet" for split in (*splits, "items")},
    }


class Sampler(logging.Handler):
    """The largest resident set of this process, and the stage in which it was reached."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.peak = self.anonymous = self.most_anonymous = 0
        self.moment = self._stage = "before the first stage"
        self.stages: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Note the stage that begins."""
        self._stage = record.getMessage()

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
            now, anonymous = int(found["VmRSS"]) * KIB, int(found["RssAnon"]) * KIB
            self.most_anonymous = max(self.most_anonymous, anonymous)
            self.stages[self._stage] = max(self.stages.get(self._stage, 0), now)
            if now > self.peak:
                self.peak, self.anonymous, self.moment = now, anonymous, self._stage

    def __enter__(self) -> "Sampler":
        stages = logging.getLogger("tasks.orchestration.progress")
        stages.setLevel(logging.INFO)
        stages.addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def carry_out(preset: str, *, engine: bool, retrieval: bool) -> None:
    """Run the order in this process and print the estimate and the measurement, in bytes."""
    from compressors.contracts import Limit
    from flows.cli import console
    from flows.explain import explain
    from flows.order import Order
    from flows.terms import Targets

    metric = "recall@20" if retrieval else "auc"
    order = Order.model_validate(
        {
            "model": "large@1",
            "preset": preset,
            "limits": (Limit.parse(f"{metric} vs baseline >= -0.4"),),
            "targets": Targets(tensorrt_rtx="required" if engine else "off"),
            "steps": TRAINING_STEPS if preset == "custom" else (),
        }
    )
    begin = time.monotonic()
    estimate = explain(order).memory
    with Sampler() as sampled:
        console.run(order, quiet=True)
    result = {
        "estimate": estimate.model_dump(),
        "peak": sampled.peak,
        "anonymous": sampled.anonymous,
        "most_anonymous": sampled.most_anonymous,
        "moment": sampled.moment,
        "stages": sampled.stages,
        "seconds": time.monotonic() - begin,
    }
    print(json.dumps(result))


def measure(case: Case) -> dict[str, object]:
    """Pack and compress one case in processes of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "draft", case)
        environ = {
            **os.environ,
            "RECPRESS_HOME": f"{scratch}/recpress",
            "PREFECT_HOME": f"{scratch}/prefect",
            "RECPRESS_ALLOWED_MODULES": "benchmarks",
        }
        pack = [sys.executable, "-m", "flows.cli.app", "bundle", "pack", f"{scratch}/draft"]
        subprocess.run(pack, env=environ, check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-m", "benchmarks.peak_memory", "--inside"]
        command += [case.preset, str(case.engine), str(case.retrieval)]
        ran = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
        sizes = {path.name: path.stat().st_size for path in Path(scratch, "draft").iterdir()}
        return found | {"sizes": sizes}


def main() -> None:
    """Print one line a case, as a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--json", type=Path, help="Also write every measurement to this file.")
    given = parser.parse_args()
    if given.inside:
        preset, engine, retrieval = given.inside
        carry_out(preset, engine=engine == "True", retrieval=retrieval == "True")
        return
    print("| case | table rows | hidden | training rows | preset | engine | estimate MiB | "
          "peak MiB | anonymous MiB | ratio | peak in |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in given.case or CASES:
        case = CASES[name]
        found = measure(case)
        if given.json:
            with given.json.open("a") as file:
                file.write(json.dumps({"case": name, **case._asdict(), **found}) + "\n")
        estimate, peak = found["estimate"]["peak"] / MIB, found["peak"] / MIB  # type: ignore[index, operator]
        print(
            f"| {name} | {case.rows:,} | {case.hidden:,} | {case.train:,} | {case.preset} | "
            f"{'yes' if case.engine else 'no'} | {estimate:,.0f} | {peak:,.0f} | "
            f"{found['most_anonymous'] / MIB:,.0f} | {estimate / peak:.2f} | {found['moment']} |",  # type: ignore[operator]
            flush=True,
        )


if __name__ == "__main__":
    main()
