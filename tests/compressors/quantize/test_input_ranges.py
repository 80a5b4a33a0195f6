"""Warnings about layers whose input channels share a scale and have very different ranges.

A channel is coarse if its range has only few levels of the shared scale. The layer ``first`` of the
network (``tests/mixed_ranges.py``) has 19 input channels: 16 of an embedding, whose standard
deviation is ``spread`` (by default 0.05), and 3 features from 0 to ``largest``.

In a warning, ``coarse`` is the number of coarse channels, ``range`` the largest absolute input, and
``widest`` the channels with the largest ranges.
"""

import json

import pytest
import torch
from mixed_ranges import DIM, model_and_bench
from reason_codes import codes_of, require_reason

from compressors.contracts import Plan, PlanLine
from compressors.core.runner import run
from compressors.quantize.dense.float8_dense import Float8Dense
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.weight_int8 import WeightInt8
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

STEPS = {
    "static_int8": StaticInt8(),
    "weight_int8": WeightInt8(activations="int8", block=0),  # one scale for all inputs
}


@pytest.mark.parametrize("kind", STEPS)
def test_large_inputs_next_to_small_embeddings_give_a_warning_on_the_layers_plan_line(
    tmp_path, kind
):
    model, bench = model_and_bench(tmp_path, largest=12.0)
    plan = run(STEPS[kind], model, bench, tmp_path / "out").plan
    line = plan.of("first")
    warning = require_reason(line.warnings, "mixed_input_ranges", coarse=16, channels=19)
    # The largest of the uniform calibration inputs is slightly less than 12.
    assert warning.fields["range"] == pytest.approx(12, rel=0.01)
    widest = {
        reason.fields["channel"]: reason.fields["largest"] for reason in warning.fields["widest"]
    }
    # Channels 16 to 18 are the features.
    assert widest == dict.fromkeys((16, 17, 18), pytest.approx(12, rel=0.05))
    assert plan.of("out").warnings == ()


@pytest.mark.parametrize("kind", STEPS)
def test_inputs_of_similar_ranges_give_no_warning(tmp_path, kind):
    model, bench = model_and_bench(tmp_path, largest=1.0, spread=0.3)
    plan = run(STEPS[kind], model, bench, tmp_path / "out").plan
    assert [line.module for line in plan.lines if line.warnings] == []


def test_inputs_4000_times_the_embeddings_give_a_warning_in_int8_and_none_in_8_bit_floats(tmp_path):
    model, bench = model_and_bench(tmp_path, largest=200.0)
    int8 = run(StaticInt8(), model, bench, tmp_path / "int8").plan.of("first").warnings
    assert codes_of(int8) == ["mixed_input_ranges"]
    # E4M3 keeps 4 significant bits down to 1 / 28,672 of the largest input.
    assert run(Float8Dense(), model, bench, tmp_path / "f8").plan.of("first").warnings == ()


def test_inputs_20_million_times_the_embeddings_give_a_warning_in_8_bit_floats(tmp_path):
    model, bench = model_and_bench(tmp_path, largest=1e6)
    warnings = run(Float8Dense(), model, bench, tmp_path / "f8").plan.of("first").warnings
    require_reason(warnings, "mixed_input_ranges", range=pytest.approx(1e6, rel=0.01))


def test_coarse_channels_with_zero_weights_give_no_warning(tmp_path):
    model, bench = model_and_bench(tmp_path, largest=12.0)
    with torch.no_grad():
        model.module.first.weight[:, :DIM] = 0
    assert run(StaticInt8(), model, bench, tmp_path / "a").plan.of("first").warnings == ()


def test_scores_change_over_three_times_as_much_with_a_warning_as_without(tmp_path):
    errors = {}
    for largest in (1.0, 12.0):
        (tmp_path / str(largest)).mkdir()
        model, bench = model_and_bench(tmp_path / str(largest), largest=largest, spread=0.05)
        result = run(StaticInt8(), model, bench, tmp_path / str(largest) / "out")
        torch.manual_seed(1)
        inputs = {"user": torch.randint(0, 500, (500,)), "counts": torch.rand(500, 3) * largest}
        with torch.no_grad():
            before, after = model.module(**inputs), result.module(**inputs)
        errors[largest] = float((after - before).std() / before.std())
        assert (result.plan.of("first").warnings == ()) == (largest == 1.0)
    assert errors[12.0] > 3 * errors[1.0]


def test_a_warning_stays_in_the_plan_after_a_step_that_does_not_change_the_layer(tmp_path):
    model, bench = model_and_bench(tmp_path, largest=12.0)
    first = run(StaticInt8(), model, bench, tmp_path / "a")
    second = run(RowwiseInt8(), first, bench, tmp_path / "b")
    assert second.plan.of("first").warnings == first.plan.of("first").warnings
    assert codes_of(first.plan.of("first").warnings) == ["mixed_input_ranges"]


def test_without_calibration_rows_there_is_no_warning(tmp_path):
    model, bench = model_and_bench(tmp_path, largest=12.0)
    without_rows = bench.model_copy(update={"calibration": None})
    assert (
        run(STEPS["weight_int8"], model, without_rows, tmp_path / "a").plan.of("first").warnings
        == ()
    )


def test_a_stored_plan_line_without_the_warning_fields_loads_with_no_warning():
    line = PlanLine.model_validate(
        {"module": "a", "role": "dense", "format": "f", "bytes_before": 1, "bytes_after": 1}
        | {"reason": "r"}
    )
    stored = json.loads(Plan(lines=(line,)).model_dump_json())
    del stored["lines"][0]["warning"], stored["lines"][0]["warnings"]
    assert Plan.model_validate(stored).lines[0].warnings == ()
