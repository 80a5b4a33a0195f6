"""Adding a target: one declaration, with a lowering and a runtime, makes it usable in orders.

The added target runs plain ONNX graphs in ONNX Runtime without graph optimizations. A home is the
folder with everything that recpress stores (``RECPRESS_HOME``).

``write_draft`` (``tests/drafts.py``) writes a draft: the folder that becomes a bundle when it is
packed. Its network has the tables ``user``, ``item`` and ``tags``.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drafts import ROWS, write_draft
from error_codes import raises_code, raises_value_error
from onnxscript import opset21 as op
from orders import run_without_prefect, use_copied_home, use_home

from compressors.contracts import Limit, Plan, digest
from compressors.contracts.targets import TARGETS, Engines, Target, register
from compressors.contracts.targets.builder import BuildRequest
from compressors.core.modules.formats import PackedLinear
from compressors.errors.compression import AuditFailed
from compressors.lower.findings import GraphAudit, LayerInitializer, TableInitializers
from compressors.lower.graph_builders import FLOAT
from compressors.lower.targets.target import FLOAT32_ERROR, FLOAT_ROUNDING, Tolerance
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.cli.orders import build_terms
from flows.order import Order
from flows.terms import Targets, Terms
from infra.errors import BuildRefused, CommandRefused
from tasks.bundles.packing import pack
from tasks.orchestration.documents import Report, read_report
from tasks.orchestration.workspace import local
from tasks.promotion.promotions import fetch, promote, registry
from tasks.report.page import page, read_validation
from tasks.report.tables import markdown, number_rows

pytestmark = pytest.mark.xdist_group("added target")

PARITY_ROWS = ROWS["calibration"]
STEPS = (RowwiseInt8(),)
LIMITS = (Limit.parse("auc vs baseline >= -0.02"), Limit.parse("bytes vs baseline <= 0.9"))
SCORED_ROWS: list[int] = []
"""The number of rows in each call of the added runtime."""


def rowwise_int8(codes: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Translate a lookup in a row-wise int8 table: gather codes and scales, then multiply."""
    assert rows_per_scale == 1
    assert offset is None
    rows = op.Cast(op.Gather(codes, ids, axis=0), to=FLOAT)
    return op.Mul(rows, op.Cast(op.Gather(scale, ids, axis=0), to=FLOAT))


class PlainLowering:
    """Lowers models to graphs that contain only standard ONNX operators.

    It has the members of the protocol ``LoweringTarget``. It looks up each table separately, stores
    tensors with the types of the module, and lets no layer multiply by stored codes.
    """

    can_merge_lookups = False

    def translations(self) -> Mapping[Any, Callable[..., Any]]:
        return {torch.ops.recpress.rowwise_int8.default: rowwise_int8}

    def convert_table_tensor(self, *_: object) -> None: ...

    def convert_layer_tensor(self, *_: object) -> None: ...

    def stays_packed(self, layer: PackedLinear) -> bool:
        return False

    def passes(self) -> tuple[()]:
        return ()

    def tolerance(self, plan: Plan | None) -> Tolerance:
        return FLOAT_ROUNDING

    def rounding_error(self, plan: Plan | None) -> float:
        return FLOAT32_ERROR

    def has_unsupported_matmuls(self, plan: Plan | None) -> bool:
        return False

    def audit(
        self,
        graph: onnx.GraphProto,
        plan: Plan | None,
        tables: tuple[TableInitializers, ...],
        layers: tuple[LayerInitializer, ...],
    ) -> GraphAudit:
        gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
        for table in tables:
            if not gathered.issuperset(table.names):
                raise AuditFailed(
                    "graph_not_as_ordered", faults=(f"{table.module} is not gathered",)
                )
        return GraphAudit(
            nodes={},
            int8_products=0,
            packed_tables=sum(table.format != "float32" for table in tables),
            weight_bytes=sum(len(item.raw_data) for item in graph.initializer),
        )


class UnoptimizedSession:
    """An ONNX Runtime session without graph optimizations."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options)
        self.inputs = tuple(item.name for item in self._session.get_inputs())

    def scores(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        scores: np.ndarray = self._session.run(None, {name: inputs[name] for name in self.inputs})[
            0
        ]
        SCORED_ROWS.append(len(scores))
        return scores

    def bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
        return lambda: self.scores(inputs)


class UnoptimizedRuntime:
    """ONNX Runtime without graph optimizations."""

    def version(self) -> str:
        return str(onnxruntime.__version__)

    def open(self, path: Path, threads: int) -> UnoptimizedSession:
        return UnoptimizedSession(path, threads)

    def optimized_graph(self, path: Path) -> onnx.GraphProto:
        return onnx.load(path).graph


def has_packed_tables(path: Path) -> bool:
    """Return whether a graph has packed tables: weights stored as int8 or uint8 codes."""
    types = {item.data_type for item in onnx.load(path).graph.initializer}
    return bool(types & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8})


class NoisySession(UnoptimizedSession):
    """Returns random scores for large batches if the graph has packed tables.

    Scores of small batches are correct, so that the parity check (the comparison of the graph with
    the module, on ``PARITY_ROWS`` rows) passes.
    """

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, threads)
        self.is_packed = has_packed_tables(path)

    def scores(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        scores = super().scores(inputs)
        if not self.is_packed or len(scores) <= PARITY_ROWS:
            return scores
        return np.random.default_rng(0).random(len(scores), np.float32)


class NoisyRuntime(UnoptimizedRuntime):
    """Opens every graph in a ``NoisySession``."""

    def open(self, path: Path, threads: int) -> UnoptimizedSession:
        return NoisySession(path, threads)


class RefusingRuntime(UnoptimizedRuntime):
    """Refuses graphs without packed tables, and so the untouched model."""

    def open(self, path: Path, threads: int) -> UnoptimizedSession:
        if not has_packed_tables(path):
            raise BuildRefused("graph_missing", path=str(path))
        return super().open(path, threads)


@dataclass(frozen=True)
class CopiedEngine:
    """The result of ``CopyingBuilder``."""

    path: str
    bytes: int
    version: str = "1"

    def record(self, name: str) -> str:
        return json.dumps({"path": name, "audit": {"copied_bytes": self.bytes}})


@dataclass(frozen=True)
class CopyingBuilder:
    """A builder whose engines are copies of the graphs."""

    target: str

    def version(self) -> str:
        return "1"

    def build(self, request: BuildRequest, folder: Path) -> CopiedEngine:
        path = folder / "model.copy"
        shutil.copy(request.onnx, path)
        return CopiedEngine(str(path), path.stat().st_size)


TARGET = Target(
    name="not-optimized",
    label="ONNX Runtime as written",
    lowering=PlainLowering,
    runtime=UnoptimizedRuntime,
)


@pytest.fixture
def added_target(request: pytest.FixtureRequest) -> Iterator[None]:
    """Register ``TARGET``, with fields replaced by the test's parameter."""
    register(replace(TARGET, **getattr(request, "param", {})))
    SCORED_ROWS.clear()
    yield
    del TARGETS[TARGET.name]


def order_for(**targets: str) -> Order:
    """Return the order of these tests for some targets, by their field names."""
    return Order(
        model="clicks@1",
        preset="custom",
        steps=STEPS,
        limits=LIMITS,
        targets=Targets.model_validate(targets),
    )


@pytest.fixture(scope="module")
def finished_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the order has run without the added target."""
    home = tmp_path_factory.mktemp("finished") / "recpress"
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home)
        pack(write_draft(home.parent / "draft"))
        run_without_prefect(order_for())
    return home


@pytest.fixture
def home(finished_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a copy of ``finished_home``; it has cached results of all tasks for ONNX Runtime."""
    use_copied_home(monkeypatch, finished_home, tmp_path / "recpress")


def test_registered_target_is_lowered_measured_judged_and_published(
    added_target: None, home: None, tmp_path: Path
) -> None:
    order = order_for(not_optimized="required")
    finished = run_without_prefect(order).finished
    report = finished.report
    default, added = report.targets
    assert (default.target, added.target) == ("onnxruntime", "not-optimized")
    assert added.verdict.outcome == report.outcome == "accepted", added.verdict.reason
    assert [item.limit for item in added.verdict.judgements] == list(LIMITS)
    (graph,) = added.lowering.graphs
    assert graph.audit is not None
    assert graph.audit.packed_tables == 3  # user, item and tags
    assert graph.rows_parity.rows == PARITY_ROWS

    measured = report.measured[added.target]
    assert sum(SCORED_ROWS) > 2 * measured.rows  # the untouched model and the result
    machine = measured.machine
    assert (machine.runtime, machine.version) == (TARGET.label, onnxruntime.__version__)
    change_of_default, change_of_added = (
        report.measured[name].numbers.of("auc", "baseline") for name in ("onnxruntime", TARGET.name)
    )
    assert change_of_default is not None
    assert change_of_added is not None
    # Both targets compute the same function.
    assert change_of_added.point == pytest.approx(change_of_default.point, abs=1e-5)
    assert measured.numbers.of("p50_ms@1", "absolute") is not None

    version = registry().version("clicks", finished.version)
    assert version.tags["recpress.verdict.not-optimized"] == "accepted"
    promote("clicks", finished.version, "")
    fetch("clicks", "@champion", TARGET.name, tmp_path / "served")
    assert (tmp_path / "served" / "model.onnx").exists()

    limits = (Limit.parse("auc vs champion >= -0.02"),)
    # The published version is now the champion, with which a new candidate is compared.
    compared = run_without_prefect(order.model_copy(update={"limits": limits})).finished.report
    assert compared.champion == default.artifact
    assert compared.other_champions == {TARGET.name: added.artifact}
    for measurement in compared.measured.values():
        assert measurement.numbers.of("auc", "champion") is not None


def assert_report_shows_target(report: Report) -> None:
    """Assert that the tables and the page of a report show the added target."""
    rows = number_rows(report)
    assert {"change", "before, not-optimized", "change, not-optimized"} <= set(rows[0])
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert "ONNX Runtime as written" in markdown(report)
    html = page(report, read_validation(report.validation))
    assert "not-optimized p50 latency" in html
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("added_target", [{"runtime": NoisyRuntime}], indirect=True)
def test_each_target_is_judged_by_the_scores_of_its_runtime(
    added_target: None, home: None, tmp_path: Path
) -> None:
    order = order_for(not_optimized="required")
    report = run_without_prefect(order).finished.report
    verdicts = {item.target: item.verdict.outcome for item in report.targets}
    assert verdicts == {"onnxruntime": "accepted", "not-optimized": "rejected"}
    assert report.outcome == "rejected"
    assert_report_shows_target(report)


def test_order_can_have_only_an_added_target(
    added_target: None, home: None, tmp_path: Path
) -> None:
    order = order_for(onnxruntime="off", not_optimized="required")
    result = run_without_prefect(order)
    report = result.finished.report
    assert list(report.measured) == [TARGET.name]
    assert report.outcome == "accepted"
    assert "measure not-optimized" in [name for name, _ in result.tasks]
    assert "measure onnxruntime" not in [name for name, _ in result.tasks]
    assert "'change' compares ONNX Runtime as written" in markdown(report)
    assert read_report(result.finished.release) == report


ENGINES = Engines(builder=CopyingBuilder, suffix=".copy")


@pytest.mark.parametrize("added_target", [{"engines": ENGINES}], indirect=True)
@pytest.mark.slow
def test_added_target_with_a_builder_is_measured_with_its_engines(
    added_target: None, home: None, tmp_path: Path
) -> None:
    order = order_for(onnxruntime="off", not_optimized="required")
    result = run_without_prefect(order)
    (target,) = result.finished.report.targets
    assert target.verdict.outcome == "accepted", target.verdict.reason
    assert target.audits == {"model": {"copied_bytes": target.bytes}}
    assert target.lowering.graphs[0].audit is None  # the builder audits the engine instead
    assert [name for name, _ in result.tasks].count("build not-optimized") == 2  # untouched, result
    assert (local(target.artifact) / "model.copy").exists()
    assert not (local(target.artifact) / "model.onnx").exists()


@pytest.mark.parametrize("added_target", [{"runtime": RefusingRuntime}], indirect=True)
@pytest.mark.slow
def test_optional_target_that_cannot_load_the_untouched_model_is_skipped(
    added_target: None, home: None, tmp_path: Path
) -> None:
    order = order_for(not_optimized="optional")
    report = run_without_prefect(order).finished.report
    assert [item.target for item in report.targets] == ["onnxruntime"]
    assert list(report.skipped) == [TARGET.name]
    assert report.outcome == "accepted"


def build_terms_for_added_target() -> Terms:
    """Return the order (without custom steps) of ``compress clicks --target not-optimized``."""
    return build_terms(
        "clicks",
        preset="safe",
        limits=["auc vs baseline >= -0.1"],
        targets=[TARGET.name],
        optional=[],
        promote=False,
        seed=0,
    )


def test_added_target_is_in_the_form_and_in_the_command_line(added_target: None) -> None:
    field = Targets.model_json_schema()["properties"]["not_optimized"]
    assert field["enum"] == ["required", "optional", "off"]
    terms = build_terms_for_added_target()
    assert terms.targets.requirements() == {
        "onnxruntime": "required",
        "not-optimized": "required",
    }


def test_registering_a_target_does_not_change_the_digest_of_orders_without_it(
    request: pytest.FixtureRequest,
) -> None:
    order = order_for(tensorrt="optional")
    order_json = order.model_dump_json()
    request.getfixturevalue("added_target")  # registers the target
    without_target = order_for(tensorrt="optional", not_optimized="off")
    assert without_target.model_dump_json() == order_json
    assert digest(without_target) == digest(order)


def test_unregistered_target_is_refused_as_unknown() -> None:
    with raises_value_error("target_unknown", target="not_optimized"):
        order_for(not_optimized="required")
    with raises_code(CommandRefused, "target_unknown", target="not-optimized"):
        build_terms_for_added_target()


def test_registering_a_target_twice_or_a_second_default_raises_value_error(
    added_target: None,
) -> None:
    with pytest.raises(ValueError, match="not-optimized"):
        register(TARGET)
    with pytest.raises(ValueError, match="onnxruntime"):
        register(replace(TARGET, name="other", is_default=True))
