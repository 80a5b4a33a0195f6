"""Reports for tests of the HTML page: their numbers are invented, their artifacts not stored.

A judgement is the outcome for one limit. The fields of a parity are differences between scores of
graph and module, and their limits; ``spread`` is the standard deviation of the module's scores.
``rows_parity`` is for rows of data, ``edge_parity`` for edge cases, such as ids out of range.

Many names and reasons contain HTML, to check that the page escapes them.
"""

from typing import Any

from compressors.contracts import Artifact, Estimate, Judgement, Limit, Plan, PlanLine, Verdict
from compressors.contracts.reasons import Reason
from compressors.contracts.targets.runtime import Machine
from compressors.lower.findings import GraphAudit, Parity
from compressors.metrics.measured import Measured, Number
from flows.order import Order
from flows.terms import Targets
from infra.data.expectations import Finding, Validation
from tasks.orchestration.documents import Measurement, Report, Stage, TargetReport
from tasks.orchestration.graph_documents import GraphInput, LoweredGraph, Lowering

HOSTILE = "<script>alert('|table|')</script>"
"""A name that contains HTML and the separator of Markdown tables."""

PASSED = Validation(
    success=True,
    evaluated=2,  # checks that could be evaluated
    intended=2,  # planned checks
    findings=tuple(
        Finding(split=split, column="user", rule="no null", success=True, observed="all 9 value(s)")
        for split in ("train", "test")
    ),
    seconds=0.5,
)


def create_artifact(letter: str, size: int = 1000) -> Artifact:
    """Return an artifact whose hash is one repeated letter."""
    return Artifact(uri=f"file:///store/artifacts/{letter * 64}", sha256=letter * 64, bytes=size)


def create_estimate(point: float, half_width: float = 0.0, rows: int | None = None) -> Estimate:
    """Return an estimate with a symmetric interval."""
    return Estimate(point=point, low=point - half_width, high=point + half_width, rows=rows)


def create_plan(tables: int) -> Plan:
    """Return a plan with tables of increasing size, a dense layer, and a module ``HOSTILE``."""
    lines = [
        PlanLine(
            module=f"tables.t{number:04}",
            role="table",
            format="rowwise_int4",
            bytes_before=640 * (number + 1),
            bytes_after=100 * (number + 1),
            reasons=(Reason("as_written", text=f"reason {number:04}"),),
        )
        for number in range(tables)
    ]
    dense = PlanLine(
        module="head",
        role="dense",
        format="static_int8",
        bytes_before=4000,
        bytes_after=1100,
        reasons=(Reason("selected", step="static_int8"),),
    )
    hostile = PlanLine(
        module=HOSTILE,
        role="other",
        format="as trained",
        bytes_before=8,
        bytes_after=8,
        reasons=(Reason("as_written", text="</td></table><img src=x onerror=alert(1)>"),),
    )
    return Plan(lines=(*lines, dense, hostile))


def create_measurement() -> Measurement:
    """Return a measurement of two quality metrics, bytes, and p50 and p99 at three batch sizes."""
    after, before = [], []

    def add(metric: str, value: Estimate, change: Estimate, baseline: Estimate | None) -> None:
        after.append(Number(metric=metric, against="absolute", estimate=value))
        after.append(Number(metric=metric, against="baseline", estimate=change))
        if baseline is not None:
            before.append(Number(metric=metric, against="absolute", estimate=baseline))

    for metric, value, change in (("auc", 0.71, -0.0009), ("logloss", 0.55, 0.0007)):
        baseline = create_estimate(value - change)
        add(metric, create_estimate(value, 0.006), create_estimate(change, 0.0006), baseline)
    add("bytes", create_estimate(250_000), create_estimate(0.25), None)
    for quantile, factor in (("p50", 1.0), ("p99", 2.5)):
        for size, median, ratio in ((1, 0.06, 1.3), (64, 0.3, 0.9), (1024, 3.0, 0.7)):
            value = median * factor
            baseline = create_estimate(value, value * 0.04)
            latency = create_estimate(value * ratio, value * 0.05)
            add(f"{quantile}_ms@{size}", latency, create_estimate(ratio, 0.05), baseline)
    return Measurement(
        numbers=Measured(numbers=tuple(after)),
        baseline=Measured(numbers=tuple(before)),
        resolves={"auc": 0.0006},  # smallest change of the metric that these rows can detect
        rows=20_000,
        machine=Machine(
            processor="A <b>processor</b>",
            cores=2,
            system="Linux x86_64",
            runtime="ONNX Runtime",
            version="1.30.0",
            threads=1,
            int8_dot=True,
        ),
    )


JUDGEMENTS = (
    Judgement(
        limit=Limit.parse("auc vs baseline >= -0.002"),
        measured=create_estimate(-0.0009, 0.0006, rows=20_000),
        outcome="accepted",
        reasons=(
            Reason(
                "number_in_interval",
                metric="AUC vs baseline",
                number="-0.0009",
                low="-0.0015",
                high="-0.0003",
                relation=">=",
                limit="-0.0020",
            ),
            Reason("limit_met"),
        ),
    ),
    Judgement(
        limit=Limit.parse("p99_ms@64 vs baseline <= 0.92"),
        measured=create_estimate(0.9, 0.05),
        outcome="undecided",
        reasons=(
            Reason(
                "number_in_interval",
                metric="p99 latency at batch 64 vs baseline",
                number="0.900 times",
                low="0.850",
                high="0.950",
                relation="<=",
                limit="0.920 times",
            ),
            Reason("more_rounds_decide"),
        ),
    ),
    Judgement(
        limit=Limit.parse("bytes <= 200000"),
        measured=create_estimate(250_000),
        outcome="rejected",
        reasons=(
            Reason(
                "exact_number",
                metric="size",
                number="250,000 bytes",
                relation="<=",
                limit="200,000 bytes",
            ),
            Reason("limit_missed"),
        ),
    ),
    Judgement(
        limit=Limit.parse("auc vs champion >= 0"),
        measured=None,
        outcome="accepted",
        reasons=(Reason("no_champion", metric="AUC"),),
    ),
)


def create_lowering(target: Any) -> Lowering:
    """Return the description of one quantized graph."""
    parity = Parity(
        rows=2048,
        largest=1.2e-7,
        root_mean_square=3.1e-8,
        spread=0.23,
        rms_limit=0.012,
        largest_limit=0.12,
        quantile_90=1e-6,
        quantile_90_limit=2e-4,
    )
    graph = LoweredGraph(
        name="model",
        inputs=(
            GraphInput(name="user", dtype="int64", shape=()),
            GraphInput(name="prices", dtype="float32", shape=(4,)),
        ),
        output="score",
        rows_parity=parity,
        edge_parity=parity.model_copy(update={"rows": 64}),
        audit=GraphAudit(
            nodes={"QGemm": 5, "Gather": 18}, int8_products=5, packed_tables=9, weight_bytes=145_190
        ),
        tables=(),
        packed_bytes=240_000,
    )
    return Lowering(target=target, name="clicks@1", graphs=(graph,), packed_bytes=240_000)


def create_stages() -> tuple[Stage, ...]:
    """Return three stages (models after a step); the last step is named ``HOSTILE``."""
    changes = (
        ("as trained", 1_000_000, None),
        ("channels", 700_000, -0.002),
        (HOSTILE, 250_000, 0.0),
    )
    return tuple(
        Stage(
            step=step,
            bundle=create_artifact("a"),
            bytes=size,
            quality=create_estimate(0.71, 0.006),
            change=None if change is None else create_estimate(change, 0.0004),
        )
        for step, size, change in changes
    )


def create_report(tables: int = 12, **changes: Any) -> Report:
    """Return a report of a rejected order: every kind of judgement, a skipped target and step.

    Args:
        tables: number of tables in the plan.
        changes: fields of the report to replace.
    """
    order = Order(
        model="clicks@1",
        preset="small",
        limits=tuple(item.limit for item in JUDGEMENTS),
        targets=Targets(tensorrt_rtx="required", tensorrt="optional"),
    )
    served = TargetReport(
        target="onnxruntime",
        required=True,
        artifact=create_artifact("d", 250_400),
        bytes=250_000,
        verdict=Verdict(
            target="onnxruntime",
            outcome="rejected",
            judgements=JUDGEMENTS,
            reasons=JUDGEMENTS[2].reasons,
        ),
        lowering=create_lowering("onnxruntime"),
    )
    engine = TargetReport(
        target="tensorrt-rtx",
        required=True,
        artifact=create_artifact("e", 1_300_000),
        bytes=1_296_900,
        verdict=Verdict(
            target="tensorrt-rtx", outcome="built-unmeasured", reasons=(Reason("cannot_run"),)
        ),
        lowering=create_lowering("tensorrt-rtx"),
        audits={
            "model": {
                # Scratch memory of the engine, and of its twin, an engine for half the rows.
                "scratch": "not checkable",
                "scratch_bytes": 12_476_416,
                "twin_scratch_bytes": None,
                "layer_types": {"int8": 9, "fp16": 27},
                "tables_checked": [],
            }
        },
    )
    fields: dict[str, Any] = {
        "order": "0" * 64,
        "name": "clicks",
        "bundle_version": "1",
        "metric": "auc",
        "source": create_artifact("a"),
        "compressed": create_artifact("b"),
        "champion": create_artifact("c"),
        "recipe": tuple(step.model_dump(mode="json") for step in order.recipe()),
        "limits": order.limits,
        "plan": create_plan(tables),
        "outcome": "rejected",
        "targets": (served, engine),
        "skipped": {"tensorrt": "needs the package <tensorrt>"},
        # The sentences about skipped steps, as in the JSON of a report.
        "idle": {"static_int8": "no <dense> layer is large enough"},
        "baseline_bytes": 1_000_000,
        "measurement": create_measurement(),
        "validation": create_artifact("f"),
        "calibrated_on": "calibration (4,096 rows)",
        "stages": create_stages(),
        "reproduction": order.reproduction("clicks@1"),
    }
    return Report(**(fields | changes))
