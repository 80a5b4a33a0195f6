"""Graphs of a version that Triton serves: selection, configuration, and ``recpress triton``.

``fill("ab", "a")`` publishes the orders "aaa..." and "bbb..." as versions 1 and 2, and promotes the
first (``conftest.py``). A home is the folder with everything that recpress stores
(``RECPRESS_HOME``).
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from error_codes import raises_code
from pbtxt_reader import parse_message
from reports import create_measurement, create_report, store_files
from triton_configs import loaded_version
from triton_versions import Fill, graph_bytes, publish_version

from compressors.contracts import Estimate, Outcome
from compressors.metrics.measured import Measured, Number
from flows.cli import app
from flows.cli.doctor import check_installation
from infra.errors import PromotionRefused, SettingRefused, TritonRefused
from infra.registry.ledger import Ledger
from infra.tensorrt.engines import Engine, EngineAudit
from tasks.orchestration.documents import Finished
from tasks.orchestration.graph_documents import GraphInput
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import export, promote, triton_contents

# --- configuration --------------------------------------------------------------------------


def with_latency(**milliseconds: float) -> Any:
    """Return a measurement with median latencies; ``b64=0.2`` is 0.2 ms at batch size 64."""
    without_latency = create_measurement()
    numbers = tuple(
        Number(
            metric=f"p50_ms@{name[1:]}",
            against="absolute",
            estimate=Estimate(point=point, low=point, high=point),
        )
        for name, point in milliseconds.items()
    )
    measured = Measured(numbers=(*without_latency.numbers.numbers, *numbers))
    return without_latency.model_copy(update={"numbers": measured})


def read_configuration(root: Path, model: str = "m") -> dict[str, Any]:
    """Read ``config.pbtxt`` of a Triton model; every field is a list of its values."""
    return parse_message((root / model / "config.pbtxt").read_text())


def test_configuration_has_the_measured_batches_and_threads(
    work_folder: Path, triton: Path
) -> None:
    # 10, 320 and 102 rows per millisecond, so 64 is the preferred batch size.
    measured = with_latency(b1=0.1, b64=0.2, b1024=10.0)
    promote("m", publish_version(work_folder, "a", measurement=measured).version, reason="")
    config = read_configuration(triton)
    assert config["max_batch_size"] == [1024]
    assert [item["batch_size"] for item in config["model_warmup"]] == [[1], [64], [1024]]
    promote(
        "m",
        publish_version(work_folder, "b", measurement=with_latency(b1=0.1, b64=9.0)).version,
        reason="",
    )
    config = read_configuration(triton)
    assert config["max_batch_size"] == [64]
    assert [item["batch_size"] for item in config["model_warmup"]] == [[1], [64]]
    promote("m", publish_version(work_folder, "c").version, reason="")
    assert read_configuration(triton)["max_batch_size"] == [1]  # no median latency was measured
    parameters = {
        item["key"][0]: item["value"][0] for item in read_configuration(triton)["parameters"]
    }
    assert parameters["intra_op_thread_count"] == {"string_value": ["1"]}


def test_graph_with_jagged_inputs_has_no_dynamic_batching(work_folder: Path, triton: Path) -> None:
    accepted = create_report(work_folder, "a" * 64, {"onnxruntime": "accepted"})
    inputs = (
        GraphInput(name="tags", dtype="int64", shape=(), longest=5),
        GraphInput(name="tags_offsets", dtype="int64", shape=()),
    )
    original = accepted.targets[0].lowering
    graph = original.graphs[0].model_copy(update={"inputs": inputs})
    lowering = original.model_copy(update={"graphs": (graph,)})
    target = accepted.targets[0].model_copy(update={"lowering": lowering})
    promote("m", publish_version(work_folder, "a", targets=(target,)).version, reason="")
    config = read_configuration(triton)
    assert config["max_batch_size"] == [0]
    assert [item["dims"] for item in config["input"]] == [[-1], [-1]]


def test_each_tower_of_a_retrieval_model_is_a_triton_model(work_folder: Path, triton: Path) -> None:
    one_graph = create_report(work_folder, "a" * 64, {"onnxruntime": "accepted"}).targets[0]
    towers = tuple(
        one_graph.lowering.graphs[0].model_copy(
            update={"name": name, "output": "vector", "width": 16}
        )
        for name in ("query", "item")
    )
    target = one_graph.model_copy(
        update={
            "lowering": one_graph.lowering.model_copy(update={"graphs": towers}),
            "artifact": store_files(work_folder / "towers", query_onnx="q", item_onnx="i"),
        }
    )
    promote("m", publish_version(work_folder, "a", targets=(target,)).version, reason="")
    assert (triton / "m_query" / "1" / "query.onnx").read_text() == "q"
    assert (triton / "m_item" / "1" / "item.onnx").read_text() == "i"
    config = (triton / "m_item" / "config.pbtxt").read_text()
    assert '"vector"' in config
    assert '"item.onnx"' in config


# The record of an engine, with invented numbers. The compute capability is that of the GPU on which
# it was built and can run.
ENGINE = Engine(
    path="model.plan",
    bytes=4,
    sha256="c" * 64,
    target="tensorrt",
    version="10.9",
    seconds=1,
    capability="9.0",
    audit=EngineAudit(
        scratch="flat",
        scratch_reason="",
        scratch_bytes=1,
        weights_bytes=1,
        packed_bytes=1,
        layer_types={},
        constant_bytes={},
    ),
)


def publish_with_engine(
    work_folder: Path,
    order_digit: str,
    outcome: Outcome,
    target_settings: dict[str, int] | None = None,
) -> Finished:
    """Publish a version with an accepted ONNX graph and a TensorRT engine for one GPU type.

    Args:
        work_folder: the fixture ``work_folder``.
        order_digit: the hex digit of which the order's digest consists.
        outcome: the outcome of the engine.
        target_settings: the order's settings of targets, which contain the batch sizes; None for
            the batch sizes 1 (smallest), 8 (best) and 32 (largest).
    """
    without_engine = create_report(
        work_folder, order_digit * 64, {"onnxruntime": "accepted", "tensorrt": outcome}
    )
    onnx, tensorrt = without_engine.targets
    engine = store_files(
        work_folder / f"plan{order_digit}",
        model_plan=order_digit,
        build_json=ENGINE.model_dump_json(),
    )
    targets = (onnx, tensorrt.model_copy(update={"artifact": engine}))
    batches = {"smallest_batch": 1, "best_batch": 8, "largest_batch": 32}
    order = {"targets": batches if target_settings is None else target_settings}
    reproduction = without_engine.reproduction.model_copy(update={"order": order})
    return publish_version(work_folder, order_digit, targets=targets, reproduction=reproduction)


def test_accepted_engine_is_a_triton_model_for_its_compute_capability(
    work_folder: Path, triton: Path
) -> None:
    one = publish_with_engine(work_folder, "a", "accepted").version
    promote("m", one, reason="")
    config = read_configuration(triton, "m_tensorrt")
    assert config["cc_model_filenames"] == [{"key": ["9.0"], "value": ["model-9.0.plan"]}]
    assert config["max_batch_size"] == [32]
    assert [item["batch_size"] for item in config["model_warmup"]] == [[1], [8], [32]]
    assert (triton / "m_tensorrt" / one / "model-9.0.plan").read_text() == "a"
    assert loaded_version(triton) == (one, graph_bytes("a"))


def test_unmeasured_engine_is_exported_only_with_the_option_unmeasured(
    work_folder: Path, triton: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = publish_with_engine(work_folder, "a", "built-unmeasured").version
    promote("m", one, reason="")
    assert [path.name for path in triton.iterdir()] == ["m"]
    assert {item.name for item in export("m", None, unmeasured=True)} == {"m", "m_tensorrt"}
    assert loaded_version(triton) == (one, graph_bytes("a"))
    # The new champion has no engine. Its promotion does not remove the earlier engine, but warns.
    two = publish_version(work_folder, "b").version
    promote("m", two, reason="")
    assert "m_tensorrt: the champion of m has no graph of this name" in caplog.text
    # Stale: not a graph of the champion. Sound: a server that starts now loads the champion.
    stale = {item.name: item for item in triton_contents("m", None)}["m_tensorrt"]
    assert (stale.state, stale.served, stale.sound) == ("stale", one, False)


def test_engine_without_batch_sizes_in_the_order_is_refused_before_the_ledger_entry(
    work_folder: Path, triton: Path
) -> None:
    one = publish_with_engine(work_folder, "a", "accepted", target_settings={}).version
    with raises_code(TritonRefused, "batch_sizes_missing", model="m"):
        promote("m", one, reason="")
    assert Ledger(store(), "m").entries() == ()


def test_engine_of_tensorrt_rtx_is_not_copied_to_triton(work_folder: Path, triton: Path) -> None:
    outcomes = {"onnxruntime": "accepted", "tensorrt-rtx": "accepted"}
    promote("m", publish_version(work_folder, "a", outcomes=outcomes).version, reason="")
    assert [path.name for path in triton.iterdir()] == ["m"]
    without_graph = {"tensorrt-rtx": "accepted"}
    promote("m", publish_version(work_folder, "b", outcomes=without_graph).version, reason="")
    with raises_code(PromotionRefused, "not_servable_by_triton", model="m"):
        export("m", None, unmeasured=True)


def test_engine_is_refused_if_its_folder_belongs_to_another_model(
    work_folder: Path, triton: Path
) -> None:
    # The engine of "m" and the graph of a model named "m_tensorrt" need the same folder.
    other = publish_version(work_folder, "c", name="m_tensorrt").version
    promote("m_tensorrt", other, reason="")
    with raises_code(TritonRefused, "folder_of_other_model", model="m_tensorrt", got="m"):
        promote("m", publish_with_engine(work_folder, "a", "accepted").version, reason="")
    assert Ledger(store(), "m").entries() == ()
    # Without an engine, the folder m_tensorrt is not needed.
    promote("m", publish_version(work_folder, "b").version, reason="")
    assert [item.name for item in triton_contents("m", None)] == ["m"]


def test_repository_inside_the_object_store_is_refused(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = publish_version(work_folder, "a").version
    monkeypatch.setenv("RECPRESS_TRITON", str(work_folder / "recpress"))
    with raises_code(SettingRefused, "triton_repository_holds_store"):
        promote("m", one, reason="")
    assert Ledger(store(), "m").entries() == ()


# --- the command line -----------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that runs ``recpress triton``; returns exit code, standard output and error."""

    def run_triton_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recpress", "triton", *arguments])
        capsys.readouterr()
        try:
            app.main()
            code: Any = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run_triton_command


def test_export_and_show_print_the_state_of_the_champion(
    work_folder: Path, fill: Fill, call: Any
) -> None:
    (one,) = fill("a", "a")
    to = ("--to", str(work_folder / "by hand"))
    code, out, _ = call("show", "m", *to)
    assert (code, "m is not in the repository; the champion is 1" in out) == (1, True)
    assert f"{one}/model.onnx: missing" in out
    code, out, _ = call("export", "m", *to)
    assert (code, out.startswith("m: version 1 of m is served from file://")) == (0, True)
    assert loaded_version(work_folder / "by hand") == (one, graph_bytes("a"))
    code, out, _ = call("show", "m", *to)
    assert code == 0
    assert "m serves version 1, the champion." in out
    assert f"{one}/model.onnx: ok, every hash verified" in out
    assert (work_folder / "by hand" / "m" / "config.pbtxt").read_text() in out


def test_show_reports_and_export_repairs_outdated_or_damaged_files(
    work_folder: Path, fill: Fill, call: Any
) -> None:
    one, two = fill("ab", "")
    to = ("--to", str(work_folder / "by hand"))
    promote("m", one, reason="")
    call("export", "m", *to)
    promote("m", two, reason="")
    code, out, _ = call("show", "m", *to)
    assert (code, "serves version 1 or an older configuration; the champion is 2" in out) == (
        1,
        True,
    )
    call("export", "m", *to)
    file = work_folder / "by hand" / "m" / two / "model.onnx"
    file.chmod(0o644)
    file.write_bytes(graph_bytes("f"))
    code, out, _ = call("show", "m", *to, "--json")
    (model,) = json.loads(out)
    assert (code, model["state"]) == (1, "champion")
    assert model["files"] == {f"{two}/model.onnx": "changed"}
    code, out, _ = call("export", "m", *to, "--json")
    (model,) = json.loads(out)
    assert (code, model["files"]) == (0, {f"{two}/model.onnx": "ok"})


@pytest.mark.parametrize("command", ["export", "show"])
def test_bad_input_prints_one_sentence_and_exits_with_code_2(
    work_folder: Path, call: Any, command: str
) -> None:
    def assert_refused(message: str, *arguments: str) -> None:
        code, out, err = call(command, *arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("recpress: ")
        assert message in err

    assert_refused("Set RECPRESS_TRITON or --to", "m")
    assert_refused("m has no champion in the ledger", "m", "--to", str(work_folder / "t"))
    assert_refused("without '/' and ':'", "a/b", "--to", str(work_folder / "t"))
    assert_refused("--to 'gs://b' cannot be used", "m", "--to", "gs://b")
    promote("m", publish_version(work_folder, "a").version, reason="")
    assert_refused("contains the object store", "m", "--to", str(work_folder))
    other_config = work_folder / "t" / "m" / "config.pbtxt"
    other_config.parent.mkdir(parents=True)
    other_config.write_text('name: "m"\n')
    assert_refused("was not written by recpress", "m", "--to", str(work_folder / "t"))
    assert other_config.read_text() == 'name: "m"\n'


def test_doctor_reports_the_triton_repository(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``recpress doctor`` checks each service and library, and prints one line for each."""

    def reported_state() -> tuple[str, str]:
        (line,) = (item for item in check_installation() if item.what == "Triton repository")
        return line.state, line.found

    assert reported_state() == ("absent", "RECPRESS_TRITON is not set")
    monkeypatch.setenv("RECPRESS_TRITON", str(work_folder / "triton"))
    promote("m", publish_version(work_folder, "a").version, reason="")
    assert reported_state() == ("ok", f"file://{work_folder}/triton: 1 model(s)")
    monkeypatch.setenv("RECPRESS_TRITON", "gs://b")
    assert reported_state()[0] == "fault"
