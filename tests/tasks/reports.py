"""Reports of orders that were not run: their numbers are invented, their artifacts are stored.

``page_reports.py`` has reports for tests of the HTML page, which need no stored artifacts.
"""

from pathlib import Path
from typing import Any

from compressors.contracts import (
    Artifact,
    Estimate,
    Judgement,
    Limit,
    Outcome,
    Plan,
    PlanLine,
    TargetName,
    Verdict,
    overall,
)
from compressors.contracts.reasons import Reason
from compressors.contracts.targets.runtime import Machine
from compressors.lower.findings import Parity
from compressors.metrics.measured import Measured, Number
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.data.expectations import Validation
from tasks.orchestration.documents import Measurement, Report, Reproduction, TargetReport
from tasks.orchestration.graph_documents import GraphInput, LoweredGraph, Lowering
from tasks.orchestration.workspace import store

LIMIT = Limit.parse("auc vs baseline >= -0.002")
MACHINE = Machine(
    processor="a processor",
    cores=2,
    system="Linux",
    runtime="ONNX Runtime",
    version="1",
    threads=1,
    int8_dot=True,
)


def store_files(folder: Path, **files: str) -> Artifact:
    """Store a few text files as an artifact; ``model_onnx="..."`` is the file ``model.onnx``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return store().put(folder)


def create_parity() -> Parity:
    """Return a parity (differences between graph and module) on 8 rows; its other fields are 0."""
    values: dict[str, Any] = {"rows": 8, "largest": 1e-7, "root_mean_square": 1e-8, "output": ""}
    return Parity.model_validate(dict.fromkeys(Parity.model_fields, 0) | values)


def create_lowering(target: TargetName) -> Lowering:
    """Return the description of one graph with 300 bytes of weights."""
    return Lowering(
        target=target,
        name="m@1",
        graphs=(
            LoweredGraph(
                name="model",
                inputs=(GraphInput(name="user", dtype="int64", shape=()),),
                output="score",
                rows_parity=create_parity(),  # on rows of data
                edge_parity=create_parity(),  # on edge cases, such as ids out of range
                audit=None,
                tables=(),
                packed_bytes=300,
            ),
        ),
        packed_bytes=300,
    )


def create_measurement() -> Measurement:
    """Return a measurement of AUC and one latency, each with its change from the baseline."""

    def number(metric: str, against: Any, point: float, half_width: float) -> Number:
        low, high = point - half_width, point + half_width
        estimate = Estimate(point=point, low=low, high=high, rows=1234)
        return Number(metric=metric, against=against, estimate=estimate)

    return Measurement(
        numbers=Measured(
            numbers=(
                number("auc", "absolute", 0.75, 0.01),
                number("auc", "baseline", -0.0005, 0.0012),
                number("p99_ms@64", "absolute", 0.5, 0.1),
                number("p99_ms@64", "baseline", 0.8, 0.1),
            )
        ),
        baseline=Measured(
            numbers=(
                number("auc", "absolute", 0.7505, 0.01),
                number("bytes", "absolute", 1000, 0),
                number("p99_ms@64", "absolute", 0.625, 0.1),
            )
        ),
        resolves={"auc": 0.0012},  # half the width of the interval of the change, as above
        rows=1234,
        machine=MACHINE,
    )


def create_judgements(outcome: Outcome) -> tuple[Judgement, ...]:
    """Return the judgement of ``LIMIT`` with this outcome; none if nothing was measured."""
    if outcome == "built-unmeasured":
        return ()
    low, high = {
        "accepted": (-0.001, 0.001),
        "undecided": (-0.003, 0.001),
        "rejected": (-0.005, -0.003),
    }[outcome]
    estimate = Estimate(point=(low + high) / 2, low=low, high=high, rows=100)
    reasons = (Reason("as_written", text="as measured"),)
    return (Judgement(limit=LIMIT, measured=estimate, outcome=outcome, reasons=reasons),)


def create_report(folder: Path, order: str, outcomes: dict[TargetName, Outcome]) -> Report:
    """Store files for each target, and return a report of an order with these outcomes.

    Args:
        folder: a folder for the files before they are stored.
        order: the digest of the order.
        outcomes: the outcome of each target.
    """
    targets = tuple(
        TargetReport(
            target=target,
            required=True,
            artifact=store_files(folder / order[:4] / target, model_onnx=f"{target} {order}"),
            bytes=400,
            verdict=Verdict(
                target=target,
                outcome=outcome,
                judgements=create_judgements(outcome),
                reasons=(Reason("as_written", text=f"the gate said {outcome}"),),
            ),
            lowering=create_lowering(target),
        )
        for target, outcome in outcomes.items()
    )
    bundle = store_files(folder / "bundle", x_txt="x")  # no test reads its contents
    validation = Validation(success=True, evaluated=1, intended=1, findings=(), seconds=0.5)
    line = PlanLine(
        module="user",
        role="table",
        format="rowwise_int8",
        bytes_before=1000,
        bytes_after=300,
        reasons=(Reason("selected", step="rowwise_int8"),),
    )
    return Report(
        order=order,
        name="m",
        bundle_version="1",
        metric="auc",
        source=bundle,
        compressed=bundle,
        recipe=(RowwiseInt8().model_dump(mode="json"),),
        limits=(LIMIT,),
        plan=Plan(lines=(line,)),
        outcome=overall(target.verdict for target in targets),  # combines those of the targets
        targets=targets,
        baseline_bytes=1000,  # of the untouched model's graph for the first target
        measurement=create_measurement(),
        validation=store_files(folder / "validation", validation_json=validation.model_dump_json()),
        calibrated_on="train (10 rows)",
        reproduction=Reproduction(command="recpress compress m@1", order={"model": "m@1"}),
    )
