"""ONNX Runtime sessions: bound inputs (IO binding), interleaved timing, and refused inputs."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from onnx import TensorProto, helper

from infra.errors import ScoringFailed
from infra.onnxruntime.sessions import Session
from infra.timing import measure_interleaved_ms


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A session of ``score = x - y``, whose result changes if the inputs are exchanged."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows"]) for name in "xy"]
    output = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["rows"])
    nodes = [helper.make_node("Sub", ["x", "y"], ["score"])]
    graph = helper.make_graph(nodes, "difference", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    return Session(tmp_path / "model.onnx", threads=1)


def test_bound_inputs_give_the_scores_of_passed_inputs_at_each_call(session: Session) -> None:
    rows = {"y": np.arange(6, dtype=np.float32)[::2], "x": np.ones(3, np.float32)}
    call = session.bind(rows)
    for _ in range(2):
        np.testing.assert_array_equal(call(), session.scores(rows))
    np.testing.assert_array_equal(call(), np.array([1, -1, -3], np.float32))


def test_measure_interleaved_ms_times_each_session_once_per_round(session: Session) -> None:
    rows = {name: np.ones(3, np.float32) for name in "xy"}
    times = measure_interleaved_ms([session, session], rows, rounds=4, warmup=1)
    assert [durations.shape for durations in times] == [(4,), (4,)]
    assert all(bool((durations > 0).all()) for durations in times)


def test_missing_inputs_and_inputs_of_another_type_are_refused(session: Session) -> None:
    with raises_code(ScoringFailed, "inputs_refused"):
        session.bind({"x": np.ones(3, np.float32)})
    with raises_code(ScoringFailed, "scoring_failed"):
        session.bind({name: np.ones(3, np.int64) for name in "xy"})()
