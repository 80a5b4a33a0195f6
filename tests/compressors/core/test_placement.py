"""Training in mixed precision or on a GPU, and moving a module to another device and back.

The networks are those of ``models.py``: ``RANKER`` has dense layers such as ``cross`` and
``hidden``, ``TIED`` two tables with one weight, and ``NORMED`` a batch norm.
"""

import pytest
import torch
from error_codes import raises_code
from models import NORMED, RANKER, SHORT_TRAINING, TIED
from torch import nn

from compressors.core.placement import find_device, move_to
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.errors.steps import StepRefused, TrainingFailed
from compressors.quantize.dense.static_int8 import StaticInt8

MIXED = SHORT_TRAINING.model_copy(update={"precision": "bfloat16"})


def test_training_in_bfloat16_changes_weights_like_float32_and_stores_float32(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    results = [
        run(Distill(training=training), RANKER.model(), bench, tmp_path / training.precision).module
        for training in (
            SHORT_TRAINING.model_copy(update={"epochs": 1}),
            MIXED.model_copy(update={"epochs": 1}),
        )
    ]
    in_float32, in_bfloat16 = (result.state_dict() for result in results)
    assert {tensor.dtype for tensor in in_bfloat16.values()} == {torch.float32}
    before = RANKER.model().module.hidden.weight
    change = (in_float32["hidden.weight"] - before).norm()
    difference = (in_bfloat16["hidden.weight"] - in_float32["hidden.weight"]).norm()
    # bfloat16 has 8 significant bits, so updates differ by a few percent. Equal weights would mean
    # that bfloat16 was not used.
    assert 0 < difference < 0.3 * change


def test_mixed_precision_with_packed_layers_raises_training_failed(tmp_path):
    """Packed layers have int8 codes in place of float weights."""
    bench = RANKER.bench(tmp_path / "data")
    packed = run(StaticInt8(), RANKER.model(), bench, tmp_path / "packed")
    with raises_code(TrainingFailed, "float_layers_needed", layer="cross"):
        run(FineTune(training=MIXED), packed, bench, tmp_path / "out")


def test_a_missing_device_raises_step_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench = RANKER.bench(tmp_path / "data").model_copy(update={"device": "cuda"})
    with raises_code(StepRefused, "device_missing", device="cuda"):
        run(FineTune(training=SHORT_TRAINING), RANKER.model(), bench, tmp_path / "out")


def test_move_to_restores_moved_tensors_and_keeps_replaced_tensors():
    """The meta device, whose tensors have no values, is used as the other device."""
    module = TIED.model().module
    before = dict(module.named_parameters(remove_duplicate=False))
    pointers = {name: tensor.data_ptr() for name, tensor in before.items()}
    new = nn.Parameter(torch.zeros_like(module.out.weight))
    with move_to(module, "meta"):
        assert find_device(module).type == "meta"
        assert module.item.weight is module.similar.weight
        module.out.weight = new
    after = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in after.items():
        if name == "out.weight":
            assert torch.equal(tensor, new)
        else:
            assert tensor is before[name]
            assert tensor.data_ptr() == pointers[name]


def test_move_to_restores_all_tensors_after_an_exception():
    module = NORMED.model().module
    before = dict(module.named_buffers()) | dict(module.named_parameters())
    with pytest.raises(ValueError, match="fault"), move_to(module, "meta"):
        raise ValueError("fault")
    after = dict(module.named_buffers()) | dict(module.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items())


@pytest.mark.gpu
@pytest.mark.parametrize("step", [FineTune(training=SHORT_TRAINING), Distill(training=MIXED)])
def test_training_on_a_gpu_gives_nearly_the_weights_of_training_on_a_cpu(step, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    source = RANKER.model()
    gpu_bench = bench.model_copy(update={"device": "cuda"})
    one_epoch = step.model_copy(update={"training": step.training.model_copy(update={"epochs": 1})})
    result = run(one_epoch, source, gpu_bench, tmp_path / "gpu").module
    expected = run(one_epoch, RANKER.model(), bench, tmp_path / "cpu").module
    assert find_device(result).type == find_device(source.module).type == "cpu"
    # A GPU adds in another order, and Adam amplifies the difference; bfloat16 rounds to 8 bits.
    tolerance = 0.2 if step.training.precision == "bfloat16" else 0.02
    torch.testing.assert_close(
        result.hidden.weight, expected.hidden.weight, rtol=tolerance, atol=tolerance / 4
    )
