"""Quantization-aware training: gradients, the stored layer, and the gain over static int8.

``soft_share`` is the weight of the teacher's scores (``soft_labels``) in training; the labels get
the rest. ``RANKER`` and ``NORMED`` (a batch norm after ``hidden``) are in ``tests/models.py``.
"""

from pathlib import Path

import pytest
import torch
from error_codes import raises_value_error
from models import NORMED, RANKER, SHORT_TRAINING, Reference
from reason_codes import require_reason
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import compressors.distill.training.trainer
from compressors.contracts import Bench, DenseInput, Output, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import batches
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.state.module_state import map_tensors
from compressors.distill.training.checkpoint import TrainingProgress, store_progress
from compressors.distill.training.settings import Training
from compressors.metrics.validation_score import quality
from compressors.quantize.dense.int8_codes import quantize
from compressors.quantize.dense.qat import QAT, LearnedInt8, fake_quantize
from compressors.quantize.dense.static_int8 import StaticInt8, packed_int8

# --- the quantizer ---------------------------------------------------------------------------


def test_fake_quantize_rounds_as_the_stored_layer():
    x = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.02)
    assert torch.equal(fake_quantize(x, scale, -128, 127), quantize(x, scale) * scale)


def test_fake_quantize_gradients_equal_learned_step_size_quantization():
    x = torch.tensor([0.26, -0.74, 5.0, -5.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    fake_quantize(x, scale, -8, 7).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert x.grad.tolist() == [1, 10, 0, 0]  # clipped values have no gradient
    # Esser et al., equation 3: round(v/s) - v/s inside, the bound outside
    expected = 1 * (3 - 2.6) + 10 * (-7 + 7.4) + 100 * 7 + 1000 * -8
    assert scale.grad.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_a_scale_has_the_sign_that_lowers_the_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator)
    for initial_scale in (0.5, 0.002):  # one scale is too large, the other clips nearly all values
        scale = torch.tensor(initial_scale, requires_grad=True)
        (fake_quantize(x, scale, -128, 127) - x).square().sum().backward()
        assert (scale.grad > 0) == (initial_scale == 0.5)


# --- the layer in training, and the stored layer ---------------------------------------------


def build_layer_with_changed_scales(bias: bool = True) -> LearnedInt8:
    """Return a layer in training whose scales differ from their initial values.

    A scale is its initial value times e to the power of its ``growth``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(20, 6, bias=bias)
        layer_in_training = LearnedInt8(layer, packed_int8(layer, torch.tensor(2.0)))
        with torch.no_grad():
            layer_in_training.weight_growth.uniform_(-1, 1)
            layer_in_training.input_growth.fill_(-0.3)
    return layer_in_training


@pytest.mark.parametrize("bias", [True, False])
def test_packed_layer_has_the_outputs_of_the_trained_layer(bias):
    layer_in_training = build_layer_with_changed_scales(bias).eval()
    x = torch.randn(7, 3, 20, generator=torch.Generator().manual_seed(1))
    packed = layer_in_training.packed()
    assert torch.equal(packed(x), layer_in_training(x))
    assert packed.has_bias == bias
    # In training, products are summed in float and the bias is not rounded.
    trained = layer_in_training.train()(x)
    assert trained.requires_grad
    tolerance = float((packed.weight_scale * packed.input_scale).max()) / 2 + 1e-5
    assert (trained - packed(x)).abs().max() <= tolerance
    # The outputs of the unrounded weights differ much more.
    float_output = F.linear(x, layer_in_training.weight, layer_in_training.bias)
    assert (float_output - trained).abs().max() > 10 * tolerance


def test_an_untrained_layer_is_packed_as_the_calibrated_layer():
    layer = nn.Linear(20, 6)
    packed = packed_int8(layer, torch.tensor(2.0))
    packed_again = LearnedInt8(layer, packed).packed()
    for (name, first), second in zip(packed.named_buffers(), packed_again.buffers(), strict=True):
        assert torch.equal(first, second), name


def test_every_parameter_of_a_learned_layer_gets_a_gradient():
    layer_in_training = build_layer_with_changed_scales().train()
    layer_in_training(torch.randn(50, 20)).square().sum().backward()
    assert {name for name, p in layer_in_training.named_parameters() if p.grad.abs().sum() > 0} == {
        "weight",
        "bias",
        "weight_growth",
        "input_growth",
    }


# --- the step --------------------------------------------------------------------------------


def test_qat_without_improvement_stores_the_tensors_of_static_int8(tmp_path):
    """So any difference between the two steps is an effect of training."""
    bench = RANKER.bench(tmp_path / "data")
    unchanged_training = Training(epochs=1, learning_rate=1e-30)
    step = QAT(training=unchanged_training, soft_share=0, calibrator="mse")
    trained = run(step, RANKER.model(), bench, tmp_path / "qat")
    run(StaticInt8(calibrator="mse"), RANKER.model(), bench, tmp_path / "ptq")
    torch.testing.assert_close(
        map_tensors(tmp_path / "qat"), map_tensors(tmp_path / "ptq"), rtol=0, atol=0
    )
    unchanged = Reason("training_unchanged", epochs=1)
    assert trained.plan.of("hidden").reasons == (
        Reason("selected", step="qat"),
        Reason("training_start", start=(Reason("calibrated_range", calibrator="mse"),)),
        unchanged,
    )
    assert trained.plan.reasons == (Reason("training_changed_nothing", step="qat", why=unchanged),)


def test_the_metric_in_the_plan_is_measured_with_the_stored_network(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    result = run(QAT(training=SHORT_TRAINING), RANKER.model(), bench, tmp_path / "out")
    actual = quality(result.module, RANKER.signature, bench.validation)
    assert result.plan.of("hidden").format == "static_int8"
    require_reason(
        result.plan.of("hidden").reasons, "trained_to_epoch", after=pytest.approx(actual)
    )
    before = run(StaticInt8(calibrator="best"), RANKER.model(), bench, tmp_path / "before")
    assert actual > quality(before.module, RANKER.signature, bench.validation)


def test_norms_are_trained_and_update_their_running_statistics(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    source = NORMED.model()
    result = run(QAT(training=SHORT_TRAINING), source, bench, tmp_path / "out")
    for name in ("weight", "bias", "running_mean", "running_var"):
        before, after = (m.module.norm.state_dict()[name] for m in (source, result))
        assert not torch.equal(before, after), name


class Killed(BaseException):
    """Raised in place of the end of the process."""


def test_a_training_resumed_after_a_kill_gives_the_same_bits(tmp_path, monkeypatch):
    training = SHORT_TRAINING.model_copy(update={"epochs": 4, "patience": 4})
    bench = NORMED.bench(tmp_path / "data")

    def train_with_checkpoints(name: str) -> Model:
        resumable_bench = bench.model_copy(
            update={"checkpoints": str(tmp_path / f"{name} progress")}
        )
        return run(QAT(training=training), NORMED.model(), resumable_bench, tmp_path / name)

    uninterrupted = train_with_checkpoints("whole")
    original_shuffled_rows = compressors.distill.training.trainer.shuffled_rows

    def store_then_raise(folder: str, progress: TrainingProgress) -> None:
        store_progress(folder, progress)
        if len(progress.json_values["epochs"]) == 3:
            raise Killed

    monkeypatch.setattr(compressors.distill.training.trainer, "store_progress", store_then_raise)
    with pytest.raises(Killed):
        train_with_checkpoints("killed")
    monkeypatch.undo()
    epochs = []
    monkeypatch.setattr(
        compressors.distill.training.trainer,
        "shuffled_rows",
        lambda *a, **k: epochs.append(1) or original_shuffled_rows(*a, **k),
    )
    resumed = train_with_checkpoints("killed")
    assert len(epochs) == 2  # the third and the fourth
    torch.testing.assert_close(
        map_tensors(tmp_path / "killed"), map_tensors(tmp_path / "whole"), rtol=0, atol=0
    )
    assert resumed.plan == uninterrupted.plan


def test_qat_needs_soft_labels_only_with_a_soft_share():
    assert QAT().needs == ("calibration", "train", "validation", "soft_labels")
    assert QAT(soft_share=0).needs == ("calibration", "train", "validation")


def test_qat_settings_that_train_tables_raise_a_value_error():
    with raises_value_error("qat_trains_tables"):
        QAT(training=Training(tables=True))


# --- the gain over static int8 ---------------------------------------------------------------

WIDTH, ROWS = 9, 2048


class SmallAndLargeInputsNet(nn.Module):
    """One layer over a dense vector."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 1)
        with torch.no_grad():  # the score depends equally on the small numbers and the large one
            self.out.weight.copy_(torch.tensor([[4.0, -4.0] * 4 + [0.05]]))
            self.out.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.out(x)
        return score


SIGNATURE = Signature(
    inputs=(DenseInput(name="x", shape=(WIDTH,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
SMALL_AND_LARGE = Reference(SmallAndLargeInputsNet, SIGNATURE)


def write_split_with_outlier(folder: Path, seed: int) -> Split:
    """Write rows of eight numbers near 0 and one of 60 or -60, labelled by the network."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(ROWS, WIDTH, generator=generator)
    x[:, -1] = 60 * (2 * torch.randint(2, (ROWS,), generator=generator) - 1)
    with torch.no_grad():
        score = SMALL_AND_LARGE.model().module(x).squeeze(1)
    folder.mkdir(parents=True)
    save_file({"x": x, "@label": (score > 0).float(), "score": score}, folder / "data.safetensors")
    return Split(path=str(folder), sha256="0" * 64, rows=ROWS)


@pytest.mark.parametrize("soft_share", [0.0, 0.5])
def test_qat_loses_less_than_a_third_of_the_auc_that_static_int8_loses(soft_share, tmp_path):
    """In ``static_int8``, the large input determines the range: small inputs get three levels.

    Training learns to clip the large input, of which only the sign matters, and to give it a larger
    weight.
    """
    train, validation, test = (
        write_split_with_outlier(tmp_path / str(seed), seed) for seed in (1, 2, 3)
    )
    bench = Bench(
        signature=SIGNATURE,
        calibration=train,
        train=train,
        validation=validation,
        soft_labels=train,  # the scores of the network
    )
    source = SMALL_AND_LARGE.model()
    static_int8_auc = {
        calibrator: quality(
            run(StaticInt8(calibrator=calibrator), source, bench, tmp_path / calibrator).module,
            SIGNATURE,
            test,
        )
        for calibrator in ("min_max", "percentile", "entropy", "mse", "best")
    }
    training = Training(epochs=20, patience=20, batch=64, learning_rate=0.02, warmup=0)
    step = QAT(soft_share=soft_share, training=training)
    result = run(step, source, bench, tmp_path / "qat")
    qat_auc = quality(result.module, SIGNATURE, test)
    assert quality(source.module, SIGNATURE, test) == 1.0
    # The AUC that is lost, 1 - AUC, is less than a third of that of the best calibrator.
    assert 1 - qat_auc < (1 - max(static_int8_auc.values())) / 3
    # The input range ends below half of the large input, 60.
    assert float(result.module.out.input_scale) * 127 < 30
    (rows,) = batches(test, SIGNATURE, ROWS)
    assert torch.isfinite(result.module(**rows.inputs)).all()
