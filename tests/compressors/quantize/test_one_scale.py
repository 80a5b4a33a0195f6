"""``one_scale_error`` selects one scale for a whole int8 table where that is precise enough."""

from pathlib import Path

import pytest
import torch
from models import Reference
from pydantic import ValidationError
from reason_codes import require_reason
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import IdInput, Output, Signature
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.core.state.module_state import build_module
from compressors.core.units import stored_bytes
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.table_inputs import find_table_scales
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from tasks.bundles.table_files import check, quantize

STEP = RowwiseInt8(one_scale_error=0.05)
EVEN, UNEVEN = "even", "uneven"


def weights() -> dict[str, Tensor]:
    """Return a table of similar rows, and one with a row that is 100 times larger."""
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(500, 8, generator=generator)
    uneven = torch.randn(500, 8, generator=generator)
    uneven[3] *= 100
    return {EVEN: even, UNEVEN: uneven}


class Net(nn.Module):
    """Concatenates rows of both tables; ``shared`` reads ``even`` first, then ``uneven``."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.uneven = (
            nn.Embedding.from_pretrained(weight, freeze=False) for weight in weights().values()
        )
        self.first, self.out, self.shared = nn.Linear(16, 4), nn.Linear(6, 1), nn.Linear(8, 1)

    def forward(self, even: Tensor, uneven: Tensor) -> Tensor:
        rows, others = self.even(even), self.uneven(uneven)
        hidden = torch.relu(self.first(torch.cat([rows, others], dim=1)))
        logit: Tensor = self.out(torch.cat([hidden, self.shared(rows), self.shared(others)], dim=1))
        return logit.squeeze(1)


REFERENCE = Reference(
    Net,
    Signature(
        inputs=(IdInput(name=EVEN, table=EVEN), IdInput(name=UNEVEN, table=UNEVEN)),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    ),
)


def test_only_the_table_with_a_small_error_gets_one_scale(tmp_path):
    model = run(STEP, REFERENCE.model(), REFERENCE.bench(tmp_path / "data"), tmp_path / "out")
    even, uneven = (model.module.get_submodule(name) for name in (EVEN, UNEVEN))
    assert even.get_buffer("scale").shape == (1, 1)
    assert uneven.get_buffer("scale").shape == (500, 1)
    # The reasons give the errors of the decoded rows.
    ids = torch.arange(500)
    weight = weights()[EVEN]
    error = float((even(ids) - weight).square().mean().sqrt() / weight.square().mean().sqrt())
    one, inexact = (model.plan.of(name).reasons for name in (EVEN, UNEVEN))
    found = next(reason for reason in one if reason.code == "one_scale")
    assert found.fields["error"] == pytest.approx(error, rel=1e-4)  # sums in float64
    found = next(reason for reason in inexact if reason.code == "one_scale_inexact")
    assert found.fields["error"] > 0.05


def test_tables_of_a_file_get_the_same_scales_as_those_of_a_model(tmp_path: Path):
    save_file({f"{name}.weight": weight for name, weight in weights().items()}, tmp_path / "in")
    quantize(tmp_path / "in", tmp_path / "out", STEP, block_rows=7)
    _, tables = check(tmp_path / "out")
    model = run(STEP, REFERENCE.model(), REFERENCE.bench(tmp_path / "data"), tmp_path / "run")
    for name in (EVEN, UNEVEN):
        assert tables.modules[name].settings == model.module.get_submodule(name).record().settings
        build_module(name, tables.modules[name])  # raises an error for a shape that does not fit


@pytest.mark.parametrize("changes", [{"symmetric": False}, {"rows_per_scale": 4}])
def test_settings_without_a_choice_of_scales_are_refused(changes):
    with pytest.raises(ValidationError, match="one_scale_error chooses between"):
        RowwiseInt8(one_scale_error=0.05, **changes)


def test_dry_runs_of_tables_and_layers_predict_the_bytes(tmp_path):
    bench = REFERENCE.bench(tmp_path / "data")
    step = StaticInt8(input_scales="tables")
    predicted = dry_run(STEP, REFERENCE.model(), bench)
    result = run(STEP, REFERENCE.model(), bench, tmp_path / "first")
    assert stored_bytes(predicted.module) == stored_bytes(result.module)
    predicted, result = dry_run(step, predicted, bench), run(step, result, bench, tmp_path / "next")
    assert stored_bytes(predicted.module) == stored_bytes(result.module)
    assert predicted.plan == result.plan
    require_reason(result.plan.of("first").reasons, "reads_codes_of_tables")


def test_layer_of_several_tables_has_the_scale_of_those_with_one(tmp_path):
    bench = REFERENCE.bench(tmp_path / "data")
    model = run(STEP, REFERENCE.model(), bench, tmp_path / "first")
    scales = find_table_scales(model.module, REFERENCE.signature)
    scale = float(model.module.get_submodule(EVEN).get_buffer("scale"))
    # ``shared`` also reads the table with a scale for each row, so it has no scale of a table.
    assert scales.keys() == {"first"}
    assert scales["first"][:8].tolist() == [scale] * 8
    assert bool(scales["first"][8:].isnan().all())
    result = run(StaticInt8(input_scales="tables"), model, bench, tmp_path / "second")
    stored = result.module.get_submodule("first").get_buffer("input_scale")
    assert stored[:8].tolist() == [scale] * 8
    # The other channels have the largest input of the calibration rows as highest level.
    largest = model.module.get_submodule(UNEVEN)(torch.arange(500)).abs().amax(dim=0)
    assert bool((stored[8:] * 127 <= largest * 1.0001).all())
    assert result.module.get_submodule("shared").get_buffer("input_scale").shape == ()


def test_layer_with_a_larger_error_than_allowed_stays_float32(tmp_path):
    bench = REFERENCE.bench(tmp_path / "data")
    model = run(STEP, REFERENCE.model(), bench, tmp_path / "first")
    lines = {
        most: run(
            StaticInt8(input_scales="tables", most_error=most), model, bench, tmp_path / str(most)
        ).plan.of("first")
        for most in (0.9, 1e-6)
    }
    assert {most: line.format for most, line in lines.items()} == {
        0.9: "static_int8",
        1e-6: "float32",
    }
    found = next(reason for reason in lines[0.9].reasons if reason.code == "output_error")
    assert 1e-6 < found.fields["share"] < 0.05
    require_reason(lines[1e-6].reasons, "above_most_error")
