"""How well does ``recpress explain`` estimate the peak memory of a run?

Packs and compresses click and retrieval models of several sizes, each in a separate process. The
compression is requested by an order: a model, a recipe, limits and targets. A thread of the
compressing process samples the size of its resident set. Prints the peak, the peak of the
anonymous part (memory that is not mapped from files) and the phase of the peak, next to the
estimate that was made before the run. The factors in ``tasks/orchestration/memory_estimate.py``
were chosen by these results.

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

DIM, FIELDS = 64, 20  # width of the tables; number of dense inputs
KIB, MIB = 1024, 2**20


class Case(NamedTuple):
    """The sizes of a model and of its data, and how it is compressed."""

    rows: int
    """Rows of the table, each of 64 float32 numbers; a retrieval model has two such tables."""
    hidden: int
    """Width of a click model's three dense layers, or of a retrieval model's vectors."""
    train: int
    """Training rows."""
    preset: str
    """Name of the preset; ``custom`` runs ``TRAINING_STEPS``, which train the tables."""
    engine: bool = False
    """Whether an engine for TensorRT-RTX is built as well."""
    retrieval: bool = False
    """Whether the model is a two-tower retrieval model; else it is a click model."""


# The number in a name is the size of what makes the model large: MB of the table ("table"), of the
# dense layers ("dense") or of both tables ("towers"), or millions of training rows ("rows"). A
# word after the number is the preset, "engine" if an engine is built, or "trained" for
# ``TRAINING_STEPS``. The positional arguments of a case are ``rows``, ``hidden``, ``train`` and
# ``preset``.
CASES = {
    "tiny": Case(10_000, 32, 20_000, "fast"),
    "table-100": Case(400_000, 32, 20_000, "fast"),
    "table-250": Case(1_000_000, 32, 20_000, "fast"),
    "table-500": Case(2_000_000, 32, 20_000, "fast"),
    "table-1000": Case(4_000_000, 32, 20_000, "fast"),
    "table-3000": Case(12_000_000, 32, 20_000, "fast"),
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


class ClickModel(nn.Module):
    """A click model: one table, dense inputs, three hidden layers."""

    def __init__(self, rows: int, hidden: int = 32) -> None:
        super().__init__()
        self.item = nn.Embedding(rows, DIM)
        self.first = nn.Linear(DIM + FIELDS, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, item: Tensor, dense: Tensor) -> Tensor:
        """Return logits ``(rows,)`` of ids ``(rows,)`` and dense inputs ``(rows, FIELDS)``."""
        x = torch.relu(self.first(torch.cat([self.item(item), dense], dim=1)))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        logit: Tensor = self.out(x).squeeze(1)
        return logit


class Tower(nn.Module):
    """One tower of a retrieval model: a table and a dense layer."""

    def __init__(self, name: str, rows: int, hidden: int) -> None:
        super().__init__()
        self.name = name
        self.table = nn.Embedding(rows, DIM)
        self.out = nn.Linear(DIM, hidden)

    def forward(self, **ids: Tensor) -> Tensor:
        """Return vectors ``(rows, hidden)``."""
        vectors: Tensor = self.out(self.table(ids[self.name]))
        return vectors


class TwoTowerModel(nn.Module):
    """A user tower and an item tower; the score is the dot product of their vectors."""

    def __init__(self, rows: int, hidden: int = 32) -> None:
        super().__init__()
        self.query = Tower("user", rows, hidden)
        self.item = Tower("item", rows, hidden)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Return scores ``(rows,)``."""
        return (self.query(user=user) * self.item(item=item)).sum(dim=1)


def write(folder: Path, case: Case) -> None:
    """Write the draft (data and model before packing) of a click or retrieval model.

    Labels of the click model are drawn from its logits, so that it ranks better than chance.
    """
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = TwoTowerModel if case.retrieval else ClickModel
    model = network(case.rows, case.hidden)
    if case.retrieval:
        manifest = _write_retrieval_data(folder, case)
    else:
        manifest = _write_click_data(folder, case, model)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"rows": case.rows, "hidden": case.hidden}
    path = f"benchmarks.peak_memory:{network.__name__}"
    manifest |= {
        "schema_version": 2,
        "name": "large",
        "version": "1",
        "network": {"architecture": {"path": path, "config": config}},
    }
    (folder / "model.json").write_text(json.dumps(manifest))


def _write_click_data(folder: Path, case: Case, model: nn.Module) -> dict[str, object]:
    rng = np.random.default_rng(0)
    splits = {"train": case.train, "validation": 2000, "test": 5000}
    for split, count in splits.items():
        item = rng.integers(0, case.rows, count)
        dense = rng.normal(size=(count, FIELDS)).astype(np.float32)
        scored = min(count, 20_000)  # the other rows repeat these logits, to save time
        with torch.no_grad():
            logit = model(torch.from_numpy(item[:scored]), torch.from_numpy(dense[:scored])).numpy()
        logit = np.resize((logit - logit.mean()) / logit.std(), count)
        label = (rng.random(count) < 1 / (1 + np.exp(-2 * logit))).astype(np.int64)
        columns = {"item": item, "label": label}
        columns |= {f"d{column}": dense[:, column] for column in range(FIELDS)}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    dense_columns = [f"d{column}" for column in range(FIELDS)]
    signature = {
        "inputs": [
            {"kind": "id", "name": "item", "table": "item"},
            {"kind": "dense", "name": "dense", "columns": dense_columns, "shape": [FIELDS]},
        ],
        "outputs": [
            {"name": "label", "kind": "ctr", "form": "logit", "label": "label", "metric": "auc"}
        ],
    }
    return {"signature": signature, "data": {split: f"{split}.parquet" for split in splits}}


def _write_retrieval_data(folder: Path, case: Case) -> dict[str, object]:
    rng = np.random.default_rng(0)
    splits = {"train": case.train, "validation": 500, "test": 1000}
    catalogue = min(case.rows, 20_000)
    for split, count in splits.items():
        user = rng.integers(0, min(case.rows, 300), count)
        columns = {"user": user, "item": rng.integers(0, catalogue, count)}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    pq.write_table(pa.table({"item": np.arange(catalogue)}), folder / "items.parquet")
    signature = {
        "inputs": [
            {"kind": "id", "name": "user", "table": "query.table"},
            {"kind": "id", "name": "item", "table": "item.table"},
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
        "group": "user",
        "item": "item",
        "towers": {
            "query": {"module": "query", "inputs": ["user"]},
            "item": {"module": "item", "inputs": ["item"]},
        },
    }
    return {
        "signature": signature,
        "data": {split: f"{split}.parquet" for split in (*splits, "items")},
    }


class Sampler(logging.Handler):
    """Measures the peak of this process's resident set, and the phase in which it occurs.

    It is a logging handler because the order's progress logs the name of each phase that starts.
    "Anonymous" memory is the part of the resident set that is not mapped from files.

    Attributes:
        peak: largest number of resident bytes.
        anonymous: anonymous bytes at the time of the peak.
        most_anonymous: largest number of anonymous bytes, at any time.
        moment: name of the phase in which the peak occurred.
        phases: largest number of resident bytes in each phase.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.peak = self.anonymous = self.most_anonymous = 0
        self.moment = self._phase = "before the first phase"
        self.phases: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Store the name of the phase that starts."""
        self._phase = record.getMessage()

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            status = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
            resident, anonymous = int(status["VmRSS"]) * KIB, int(status["RssAnon"]) * KIB
            self.most_anonymous = max(self.most_anonymous, anonymous)
            self.phases[self._phase] = max(self.phases.get(self._phase, 0), resident)
            if resident > self.peak:
                self.peak, self.anonymous, self.moment = resident, anonymous, self._phase

    def __enter__(self) -> "Sampler":
        phases = logging.getLogger("tasks.orchestration.progress")
        phases.setLevel(logging.INFO)
        phases.addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def run_order(preset: str, *, engine: bool, retrieval: bool) -> None:
    """Run the order in this process and print the estimate and the measurement, in bytes."""
    from compressors.contracts import Limit
    from flows.cli import console
    from flows.explain import explain
    from flows.order import Order
    from flows.terms import Targets

    metric = "recall@20" if retrieval else "auc"
    # An order needs a limit; one of -0.4 accepts every result.
    order = Order.model_validate(
        {
            "model": "large@1",
            "preset": preset,
            "limits": (Limit.parse(f"{metric} vs baseline >= -0.4"),),
            "targets": Targets(tensorrt_rtx="required" if engine else "off"),
            "steps": TRAINING_STEPS if preset == "custom" else (),
        }
    )
    start = time.monotonic()
    estimate = explain(order).memory
    with Sampler() as sampler:
        console.run(order, quiet=True)
    result = {
        "estimate": estimate.model_dump(),
        "peak": sampler.peak,
        "anonymous": sampler.anonymous,
        "most_anonymous": sampler.most_anonymous,
        "moment": sampler.moment,
        "phases": sampler.phases,
        "seconds": time.monotonic() - start,
    }
    print(json.dumps(result))


def measure(case: Case) -> dict[str, object]:
    """Pack and compress the model of one case, each in a child process; return the results."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "draft", case)
        environment = {
            **os.environ,
            "RECPRESS_HOME": f"{scratch}/recpress",
            "PREFECT_HOME": f"{scratch}/prefect",
            "RECPRESS_ALLOWED_MODULES": "benchmarks",
        }
        pack = [sys.executable, "-m", "flows.cli.app", "bundle", "pack", f"{scratch}/draft"]
        subprocess.run(pack, env=environment, check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-m", "benchmarks.peak_memory", "--inside"]
        command += [case.preset, str(case.engine), str(case.retrieval)]
        completed = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        result: dict[str, object] = json.loads(completed.stdout.splitlines()[-1])
        sizes = {path.name: path.stat().st_size for path in Path(scratch, "draft").iterdir()}
        return result | {"sizes": sizes}


def main() -> None:
    """Print a Markdown table with one line per case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)  # preset, engine, retrieval
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--json", type=Path, help="Also write every measurement to this file.")
    args = parser.parse_args()
    if args.inside:  # this is the child process that ``measure`` started for one case
        preset, engine, retrieval = args.inside
        run_order(preset, engine=engine == "True", retrieval=retrieval == "True")
        return
    print("| case | table rows | hidden | training rows | preset | engine | estimate MiB | "
          "peak MiB | anonymous MiB | ratio | peak in |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in args.case or CASES:
        case = CASES[name]
        result = measure(case)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({"case": name, **case._asdict(), **result}) + "\n")
        estimate, peak = result["estimate"]["peak"] / MIB, result["peak"] / MIB  # type: ignore[index, operator]
        print(
            f"| {name} | {case.rows:,} | {case.hidden:,} | {case.train:,} | {case.preset} | "
            f"{'yes' if case.engine else 'no'} | {estimate:,.0f} | {peak:,.0f} | "
            f"{result['most_anonymous'] / MIB:,.0f} | {estimate / peak:.2f} | {result['moment']} |",  # type: ignore[operator]
            flush=True,
        )


if __name__ == "__main__":
    main()
