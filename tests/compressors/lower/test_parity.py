"""Parity accepts rounding errors and rejects a wrong graph.

A parity check compares the scores of a graph with those of its module. Its limits are shares of
the scores' standard deviation (``SPREAD``), and depend on the target and on the plan's formats. The
tests change scores by shares that are below or above a limit. A table is packed if its plan line
has another format than float32. ``Ranker`` and ``Compact`` are networks of ``models.py``.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from models import Graph, build_recipe, lower_reference
from onnx import numpy_helper

from compressors.contracts import Plan, PlanLine
from compressors.contracts.reasons import Reason
from compressors.errors.compression import ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.comparison.parity import check_outputs, check_parity
from compressors.lower.findings import Parity
from infra.onnxruntime.sessions import Session

SPREAD = 0.1


def create_plan(*formats: str) -> Plan:
    """Return a plan with a line per format; the other fields do not affect the limits."""
    return Plan(
        lines=tuple(
            PlanLine(
                module=f"m{number}",
                role="table",
                format=table_format,
                bytes_before=4,
                bytes_after=1,
                reasons=(Reason("as_written", text="r"),),
            )
            for number, table_format in enumerate(formats)
        )
    )


def generate_scores(rows: int = 500) -> np.ndarray:
    return (0.5 + SPREAD * np.random.default_rng(0).standard_normal(rows)).astype(np.float32)


def test_equal_scores_pass_with_differences_of_zero():
    parity = check_parity(generate_scores(), generate_scores(), None, "onnxruntime")
    assert (parity.rows, parity.largest, parity.root_mean_square) == (500, 0, 0)
    assert parity.spread == pytest.approx(SPREAD, rel=0.1)


def find_exceeded_limits(failure: ParityFailure) -> set[str]:
    """Return the names of the limits that a failure exceeds.

    Limits of the differences: ``root mean square``, ``in nine of ten rows`` (the 90 % quantile),
    and ``at most`` (the largest).
    """
    return {name for name, value in failure.measured.items() if value > failure.limits[name]}


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("float_plan", [None, create_plan("float32", "float32")])
def test_float_graph_passes_with_rounding_errors_and_fails_with_larger_ones(float_plan, target):
    rounding = 1e-6 * np.sign(generate_scores() - 0.5).astype(np.float32)
    check_parity(generate_scores(), generate_scores() + rounding, float_plan, target)
    with raises_code(ParityLost, "parity_limit") as caught:
        check_parity(generate_scores(), generate_scores() + 40 * rounding, float_plan, target)
    assert "root mean square" in find_exceeded_limits(caught.value.fields["failure"])


@pytest.mark.parametrize("table_format", ["rowwise_int8", "rowwise_int4", "float16"])
def test_packed_tables_may_differ_by_float16_rounding_in_tensorrt_only(table_format):
    # TensorRT's graph rounds looked-up weights to float16 once, an error of up to 1 / 2048.
    shifted = generate_scores() + np.float32(1e-3 * SPREAD)
    check_parity(generate_scores(), shifted, create_plan(table_format), "tensorrt-rtx")
    with pytest.raises(ParityLost):
        check_parity(generate_scores(), shifted, create_plan(table_format), "onnxruntime")


def test_int8_layers_may_differ_by_one_level_in_single_rows_but_not_in_all():
    # In ONNX Runtime's graph only rows with an input at the boundary of two levels differ.
    # TensorRT's graph rounds looked-up weights to float16, so every row differs a little.
    # With static_int8 layers one row may differ by 0.2 of the spread, and nine of ten by 0.001.
    with_one_difference = generate_scores(5000)
    with_one_difference[7] += 0.15 * SPREAD
    check_parity(
        generate_scores(5000), with_one_difference, create_plan("static_int8"), "onnxruntime"
    )
    slightly_shifted, shifted = (
        generate_scores() + np.float32(share * SPREAD) for share in (0.003, 0.03)
    )
    check_parity(generate_scores(), slightly_shifted, create_plan("static_int8"), "tensorrt-rtx")
    with raises_code(ParityLost, "parity_limit") as caught:
        check_parity(generate_scores(), slightly_shifted, create_plan("static_int8"), "onnxruntime")
    assert find_exceeded_limits(caught.value.fields["failure"]) == {"in nine of ten rows"}
    with pytest.raises(ParityLost):
        check_parity(generate_scores(), shifted, create_plan("static_int8"), "tensorrt-rtx")


def test_one_row_with_a_large_difference_fails():
    changed = generate_scores(5000)
    changed[7] += 0.25 * SPREAD  # the limit is 0.2
    with raises_code(ParityLost, "parity_limit") as caught:
        check_parity(generate_scores(5000), changed, create_plan("static_int8"), "onnxruntime")
    assert find_exceeded_limits(caught.value.fields["failure"]) == {"at most"}


@pytest.mark.parametrize("swapped", [False, True])
def test_nan_in_different_rows_fails(swapped):
    expected, actual = generate_scores(), generate_scores()
    expected[[3, 9]] = np.nan
    actual[[3, 9]] = np.nan
    check_parity(expected, actual, None, "onnxruntime")
    actual[9] = 0.5
    pair = (actual, expected) if swapped else (expected, actual)
    with pytest.raises(ParityLost) as caught:
        check_parity(*pair, None, "onnxruntime")
    assert (caught.value.code, caught.value.failure.row) == ("parity_nan", 9)


def test_infinity_in_one_output_only_fails():
    changed = generate_scores()
    changed[0] = np.inf
    with pytest.raises(ParityLost):
        check_parity(generate_scores(), changed, None, "onnxruntime")


def test_equal_infinite_scores_do_not_hide_other_differences():
    expected, actual = generate_scores(), generate_scores() + np.float32(1)
    expected[0] = actual[0] = np.inf
    with pytest.raises(ParityLost) as caught:
        check_parity(expected, actual, None, "onnxruntime")
    assert caught.value.code == "parity_limit"
    infinite = generate_scores()
    infinite[0] = np.inf
    assert check_parity(infinite, infinite.copy(), None, "onnxruntime").largest == 0


def test_failure_of_vectors_has_the_row_and_component_of_the_largest_difference():
    expected = generate_scores().reshape(100, 5)
    actual = expected.copy()
    actual[40, 3] += 1
    with pytest.raises(ParityLost) as caught:
        check_parity(expected, actual, None, "onnxruntime")
    failure = caught.value.failure
    assert (failure.row, failure.component) == (40, 3)
    assert failure.found == pytest.approx(failure.expected + 1)


def test_different_numbers_of_scores_fail_with_both_shapes():
    with pytest.raises(ParityLost) as caught:
        check_parity(generate_scores(), generate_scores()[1:], None, "onnxruntime")
    assert caught.value.code == "parity_shape"
    assert caught.value.failure.shapes == ((500,), (499,))


def test_batch_with_only_refused_rows_passes():
    """A row is refused if an id is out of range: its score is NaN."""
    all_refused = np.full(4, np.nan, np.float32)
    assert check_parity(all_refused, all_refused, None, "onnxruntime").largest == 0


# --- networks that are sensitive to rounding -------------------------------------------------

RANDOM = np.random.default_rng(1).standard_normal((3, 500)).astype(np.float32)


def changes_by_rounding(share: float) -> Callable[[], np.ndarray]:
    """Return a function that returns three random changes with a share of the spread as size."""
    return lambda: np.float32(share * SPREAD) * RANDOM


def check_with_rounding(difference: float, rounding: float) -> Parity:
    """Compare scores that differ by a share of the spread, with such changes by rounding."""
    changed = generate_scores() + np.float32(difference * SPREAD) * RANDOM[0]
    return check_parity(
        generate_scores(),
        changed,
        create_plan("static_int8"),
        "onnxruntime",
        changes_by_rounding(rounding),
    )


def test_a_difference_of_less_than_twice_the_changes_by_rounding_passes():
    parity = check_with_rounding(difference=0.015, rounding=0.01)
    assert parity.by_rounding == pytest.approx(0.01 * SPREAD, rel=0.05)
    assert parity.rms_limit == pytest.approx(2 * parity.by_rounding)
    # Nine of ten values of the normal distribution are below 1.645 standard deviations.
    assert parity.quantile_90_limit == pytest.approx(2 * 0.01645 * SPREAD, rel=0.1)
    # The largest difference of int8 may be 0.2 of the spread, which is more than rounding explains.
    # 1e-5 is added to every such limit, so that scores without spread may differ by rounding.
    assert parity.largest_limit == pytest.approx(0.2 * parity.spread + 1e-5)


def test_a_difference_of_more_than_twice_the_changes_by_rounding_fails_with_both():
    with raises_code(ParityLost, "parity_limit") as caught:
        check_with_rounding(difference=0.025, rounding=0.01)
    failure = caught.value.failure
    assert find_exceeded_limits(failure) == {"root mean square", "in nine of ten rows"}
    assert failure.by_rounding == pytest.approx(0.01 * SPREAD, rel=0.05)
    assert "Rounding errors change the module's scores by 0.001" in str(failure)


def test_changes_by_rounding_are_measured_only_if_a_difference_exceeds_its_limit():
    def refuse() -> np.ndarray:
        raise AssertionError

    plan = create_plan("static_int8")
    scores = generate_scores()
    parity = check_parity(scores, scores + np.float32(1e-5), plan, "onnxruntime", refuse)
    assert parity.by_rounding == 0


def test_changes_by_rounding_of_one_output_do_not_allow_a_difference_of_another():
    expected = np.stack([generate_scores(), generate_scores()], axis=1)
    changes = np.zeros((3, 500, 2), np.float32)
    changes[:, :, 0] = np.float32(0.01 * SPREAD) * RANDOM
    plan = create_plan("static_int8")
    for output, name in enumerate(("click", "like")):
        changed = expected.copy()
        changed[:, output] += np.float32(0.015 * SPREAD) * RANDOM[0]
        arguments = expected, changed, ("click", "like"), plan, "onnxruntime", lambda: changes
        if name == "click":
            assert [parity.by_rounding > 0 for parity in check_outputs(*arguments)] == [True, False]
        else:
            with raises_code(ParityLost, "parity_limit") as caught:
                check_outputs(*arguments)
            assert caught.value.failure.output == "like"


# --- graphs with a changed weight ------------------------------------------------------------

Change = Callable[[onnx.TensorProto], np.ndarray]


def transpose(tensor: onnx.TensorProto) -> np.ndarray:
    return np.ascontiguousarray(numpy_helper.to_array(tensor).T)


def multiply(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor) * np.float32(1.5)


def roll(tensor: onnx.TensorProto) -> np.ndarray:
    return np.roll(numpy_helper.to_array(tensor), 1, axis=0)


def save_with_changed_tensor(lowered: Graph, name: str, change: Change, path: Path) -> Path:
    """Save the graph to ``path`` with one initializer changed, and return ``path``."""
    model = onnx.load(lowered.path)
    (tensor,) = (item for item in model.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(tensor), name))
    onnx.save(model, path)
    return path


def largest_weight_of(lowered: Graph, dtype: int) -> str:
    """Return the name of the largest square matrix of a dtype, the weight of the cross layer."""
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
def test_graph_with_a_transposed_weight_fails(kinds, dtype, target, tmp_path):
    lowered = lower_reference("Ranker", kinds, target)
    inputs = lowered.rows(1500)
    expected = lowered.run_in_torch(inputs)
    check_parity(expected, lowered.run_in_onnx(inputs), lowered.model.plan, target)
    name = largest_weight_of(lowered, dtype)
    path = save_with_changed_tensor(lowered, name, transpose, tmp_path / "broken.onnx")
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    actual = Session(path, threads=1).scores(arrays)
    with pytest.raises(ParityLost):
        check_parity(expected, actual, lowered.model.plan, target)


@pytest.mark.parametrize("change", [multiply, roll])
def test_graph_with_wrong_scales_of_one_table_fails(change, tmp_path):
    lowered = lower_reference("Compact", build_recipe("rowwise_int8"), "onnxruntime")
    inputs = lowered.rows(1500)
    # The second tensor of a table in int8 has its scales.
    name = next(t.names[1] for t in lowered.lowered.tables if t.module == "item")

    def round_to_float16(tensor: onnx.TensorProto) -> np.ndarray:
        return change(tensor).astype(np.float16)

    path = save_with_changed_tensor(lowered, name, round_to_float16, tmp_path / "broken.onnx")
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    actual = Session(path, threads=1).scores(arrays)
    with pytest.raises(ParityLost):
        check_parity(lowered.run_in_torch(inputs), actual, lowered.model.plan, "onnxruntime")
