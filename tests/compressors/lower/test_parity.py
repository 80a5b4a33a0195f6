"""Parity accepts rounding errors and rejects a wrong graph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from models import Graph, graph, recipe_with
from onnx import numpy_helper

from compressors.contracts import Plan, PlanLine
from compressors.contracts.reasons import Reason
from compressors.errors.compression import ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.parity import compare
from infra.onnxruntime.sessions import Session

SPREAD = 0.1


def plan(*formats: str) -> Plan:
    return Plan(
        lines=tuple(
            PlanLine(
                module=f"m{number}",
                role="table",
                format=form,
                bytes_before=4,
                bytes_after=1,
                reasons=(Reason("as_written", text="r"),),
            )
            for number, form in enumerate(formats)
        )
    )


def scores(rows: int = 500) -> np.ndarray:
    return (0.5 + SPREAD * np.random.default_rng(0).standard_normal(rows)).astype(np.float32)


def test_equal_scores_pass_and_the_numbers_are_reported():
    parity = compare(scores(), scores(), None, "onnxruntime")
    assert (parity.rows, parity.largest, parity.root_mean_square) == (500, 0, 0)
    assert parity.spread == pytest.approx(SPREAD, rel=0.1)


def exceeded(failure: ParityFailure) -> set[str]:
    """The limits that a failure's differences are over."""
    return {name for name, value in failure.measured.items() if value > failure.limits[name]}


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("decided", [None, plan("float32", "float32")])
def test_a_float_only_graph_may_differ_by_rounding_and_no_more(decided, target):
    rounding = 1e-6 * np.sign(scores() - 0.5).astype(np.float32)
    compare(scores(), scores() + rounding, decided, target)
    with raises_code(ParityLost, "parity_limit") as caught:
        compare(scores(), scores() + 40 * rounding, decided, target)
    assert "root mean square" in exceeded(caught.value.fields["failure"])


@pytest.mark.parametrize("form", ["rowwise_int8", "rowwise_int4", "float16"])
def test_packed_tables_are_held_to_float_rounding_in_onnxruntime_only(form):
    # TensorRT's form rounds a looked-up weight to float16 once: a part in a few thousand.
    off = scores() + np.float32(1e-3 * SPREAD)
    compare(scores(), off, plan(form), "tensorrt-rtx")
    with pytest.raises(ParityLost):
        compare(scores(), off, plan(form), "onnxruntime")


def test_int8_layers_may_differ_by_a_level_in_single_rows_but_not_in_all():
    # In ONNX Runtime's graph only rows at the edge of a level differ at all; TensorRT's rounds
    # looked-up weights to float16, which moves every row a little.
    one = scores(5000)
    one[7] += 0.15 * SPREAD
    compare(scores(5000), one, plan("static_int8"), "onnxruntime")
    a_little, much = (scores() + np.float32(share * SPREAD) for share in (0.003, 0.03))
    compare(scores(), a_little, plan("static_int8"), "tensorrt-rtx")
    with raises_code(ParityLost, "parity_limit") as caught:
        compare(scores(), a_little, plan("static_int8"), "onnxruntime")
    assert exceeded(caught.value.fields["failure"]) == {"in nine of ten rows"}
    with pytest.raises(ParityLost):
        compare(scores(), much, plan("static_int8"), "tensorrt-rtx")


def test_one_row_far_off_is_enough_to_fail():
    wrong = scores(5000)
    wrong[7] += 0.25 * SPREAD
    with raises_code(ParityLost, "parity_limit") as caught:
        compare(scores(5000), wrong, plan("static_int8"), "onnxruntime")
    assert exceeded(caught.value.fields["failure"]) == {"at most"}


@pytest.mark.parametrize("swapped", [False, True])
def test_refused_rows_must_be_the_same_ones(swapped):
    first, second = scores(), scores()
    first[[3, 9]] = np.nan
    second[[3, 9]] = np.nan
    compare(first, second, None, "onnxruntime")
    second[9] = 0.5
    pair = (second, first) if swapped else (first, second)
    with pytest.raises(ParityLost) as raised:
        compare(*pair, None, "onnxruntime")
    assert (raised.value.code, raised.value.failure.row) == ("parity_nan", 9)


def test_infinite_scores_are_not_called_equal():
    wrong = scores()
    wrong[0] = np.inf
    with pytest.raises(ParityLost):
        compare(scores(), wrong, None, "onnxruntime")


def test_an_infinite_score_does_not_hide_other_differences():
    first, second = scores(), scores() + np.float32(1)
    first[0] = second[0] = np.inf
    with pytest.raises(ParityLost) as raised:
        compare(first, second, None, "onnxruntime")
    assert raised.value.code == "parity_limit"
    same = scores()
    same[0] = np.inf
    assert compare(same, same.copy(), None, "onnxruntime").largest == 0


def test_the_worst_number_of_a_vector_is_named_with_its_row():
    first = scores().reshape(100, 5)
    second = first.copy()
    second[40, 3] += 1
    with pytest.raises(ParityLost) as raised:
        compare(first, second, None, "onnxruntime")
    failure = raised.value.failure
    assert (failure.row, failure.component) == (40, 3)
    assert failure.found == pytest.approx(failure.expected + 1)


def test_another_number_of_scores_is_named():
    with pytest.raises(ParityLost) as raised:
        compare(scores(), scores()[1:], None, "onnxruntime")
    assert raised.value.code == "parity_shape"
    assert raised.value.failure.shapes == ((500,), (499,))


def test_a_batch_of_refused_rows_passes():
    nothing = np.full(4, np.nan, np.float32)
    assert compare(nothing, nothing, None, "onnxruntime").largest == 0


# --- graphs that were broken by hand ---------------------------------------------------------

Break = Callable[[onnx.TensorProto], np.ndarray]


def transposed(tensor: onnx.TensorProto) -> np.ndarray:
    return np.ascontiguousarray(numpy_helper.to_array(tensor).T)


def rescaled(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor) * np.float32(1.5)


def rolled(tensor: onnx.TensorProto) -> np.ndarray:
    return np.roll(numpy_helper.to_array(tensor), 1, axis=0)


def broken(lowered: Graph, name: str, how: Break, path: Path) -> Path:
    model = onnx.load(lowered.path)
    (tensor,) = (item for item in model.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(how(tensor), name))
    onnx.save(model, path)
    return path


def largest_weight_of(lowered: Graph, dtype: int) -> str:
    """The largest square matrix of a type: the cross layer's weight."""
    model = onnx.load(lowered.path)
    square = [
        item
        for item in model.graph.initializer
        if len(item.dims) == 2 and item.dims[0] == item.dims[1] and item.data_type == dtype
    ]
    return max(square, key=lambda item: item.dims[0]).name


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [((), onnx.TensorProto.FLOAT), (("rowwise_int8", "static_int8"), onnx.TensorProto.INT8)],
)
def test_a_transposed_weight_is_caught(kinds, dtype, target, tmp_path):
    lowered = graph("Ranker", kinds, target)
    inputs = lowered.rows(1500)
    expected = lowered.in_torch(inputs)
    compare(expected, lowered.in_onnx(inputs), lowered.model.plan, target)
    name = largest_weight_of(lowered, dtype)
    path = broken(lowered, name, transposed, tmp_path / "broken.onnx")
    found = Session(path, 1).scores({key: tensor.numpy() for key, tensor in inputs.items()})
    with pytest.raises(ParityLost):
        compare(expected, found, lowered.model.plan, target)


@pytest.mark.parametrize("how", [rescaled, rolled])
def test_wrong_scales_of_one_table_are_caught(how, tmp_path):
    lowered = graph("Compact", recipe_with("rowwise_int8"), "onnxruntime")
    inputs = lowered.rows(1500)
    name = next(t.names[1] for t in lowered.lowered.tables if t.module == "item")

    def as_float16(tensor: onnx.TensorProto) -> np.ndarray:
        return how(tensor).astype(np.float16)

    path = broken(lowered, name, as_float16, tmp_path / "broken.onnx")
    found = Session(path, 1).scores({key: tensor.numpy() for key, tensor in inputs.items()})
    with pytest.raises(ParityLost):
        compare(lowered.in_torch(inputs), found, lowered.model.plan, "onnxruntime")
