"""Training in mixed precision and on another device: what moves, and what comes back."""

import pytest
import torch
from error_codes import raises_code
from models import NORMED, QUICKLY, RANKER, TIED
from torch import nn

from compressors.core.placement import device_of, moved_to
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.errors.steps import StepRefused, TrainingFailed
from compressors.quantize.dense.static_int8 import StaticInt8

MIXED = QUICKLY.model_copy(update={"precision": "bfloat16"})


def test_mixed_precision_learns_nearly_the_same_and_stores_float32(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    results = [
        run(Distill(training=how), RANKER.model(), bench, tmp_path / how.precision).module
        for how in (
            QUICKLY.model_copy(update={"epochs": 1}),
            MIXED.model_copy(update={"epochs": 1}),
        )
    ]
    plain, mixed = (result.state_dict() for result in results)
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    before = RANKER.model().module.hidden.weight
    moved = (plain["hidden.weight"] - before).norm()
    gap = (mixed["hidden.weight"] - plain["hidden.weight"]).norm()
    # bfloat16 has 8 bits: a step differs by parts of a hundred. Equality would mean that nothing
    # was computed in it.
    assert 0 < gap < 0.3 * moved


def test_packed_layers_and_mixed_precision_do_not_go_together(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    packed = run(StaticInt8(), RANKER.model(), bench, tmp_path / "packed")
    with raises_code(TrainingFailed, "float_layers_needed", layer="cross"):
        run(FineTune(training=MIXED), packed, bench, tmp_path / "out")


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench = RANKER.bench(tmp_path / "data").model_copy(update={"device": "cuda"})
    with raises_code(StepRefused, "device_missing", device="cuda"):
        run(FineTune(training=QUICKLY), RANKER.model(), bench, tmp_path / "out")


def test_what_was_moved_comes_back_as_it_was_and_what_was_replaced_as_it_is():
    """The meta device stands for any other: what lies there holds no numbers."""
    module = TIED.model().module
    before = dict(module.named_parameters(remove_duplicate=False))
    pointers = {name: tensor.data_ptr() for name, tensor in before.items()}
    new = nn.Parameter(torch.zeros_like(module.out.weight))
    with moved_to(module, "meta"):
        assert device_of(module).type == "meta"
        assert module.item.weight is module.similar.weight
        module.out.weight = new
    after = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in after.items():
        if name == "out.weight":
            assert torch.equal(tensor, new)
        else:
            assert tensor is before[name]
            assert tensor.data_ptr() == pointers[name]


def test_everything_comes_back_after_a_fault():
    module = NORMED.model().module
    before = dict(module.named_buffers()) | dict(module.named_parameters())
    with pytest.raises(ValueError, match="fault"), moved_to(module, "meta"):
        raise ValueError("fault")
    after = dict(module.named_buffers()) | dict(module.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())


@pytest.mark.gpu
@pytest.mark.parametrize("step", [FineTune(training=QUICKLY), Distill(training=MIXED)])
def test_a_gpu_learns_the_same(step, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    source = RANKER.model()
    there = bench.model_copy(update={"device": "cuda"})
    one = step.model_copy(update={"training": step.training.model_copy(update={"epochs": 1})})
    found = run(one, source, there, tmp_path / "gpu").module
    expected = run(one, RANKER.model(), bench, tmp_path / "cpu").module
    assert device_of(found).type == device_of(source.module).type == "cpu"
    # Sums in another order, amplified by a few steps of Adam; mixed precision rounds to 8 bits.
    far = 0.2 if step.training.precision == "bfloat16" else 0.02
    torch.testing.assert_close(found.hidden.weight, expected.hidden.weight, rtol=far, atol=far / 4)
