"""Quantization-aware training of tables: rounded lookups, the stored table, and the gain.

``soft_share`` is the weight of the original's scores in training; the labels get the rest.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import COMPACT, RANKER, SHORT_TRAINING, Reference
from reason_codes import require_reason
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Bench, IdInput, Output, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.runner import run
from compressors.core.state.module_state import map_tensors
from compressors.core.steps.table_encoder import encode_table
from compressors.distill.training.settings import Training
from compressors.metrics.validation_score import quality
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.table_qat import RoundedTable, TableQAT

# --- the table in training -------------------------------------------------------------------

LAYOUTS = st.tuples(st.sampled_from([8, 4, 2]), st.sampled_from([1, 2, 8, 64]))


@given(
    layout=LAYOUTS,
    rows=st.integers(1, 70),
    dim=st.integers(1, 9),
    ids=st.lists(st.integers(0, 69), max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_table_in_training_returns_the_rows_of_the_encoded_table(layout, rows, dim, ids, seed):
    bits, rows_per_scale = layout
    encoder = TableQAT(bits=bits, rows_per_scale=rows_per_scale).encoder
    table = nn.Embedding(rows, dim)
    with torch.no_grad():
        table.weight.copy_(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)))
    requests = torch.tensor([id_ % rows for id_ in ids], dtype=torch.int64)
    with torch.no_grad():
        rounded = RoundedTable(table, encoder)(requests)
    assert torch.equal(rounded, encode_table(encoder, table.weight.detach())(requests))


def test_gradients_pass_through_the_rounding_unchanged():
    table = nn.Embedding(10, 3, padding_idx=0)
    in_training = RoundedTable(table, TableQAT(bits=2).encoder)
    ids = torch.tensor([[4, 4, 0], [9, 1, 0]])
    factors = torch.randn(2, 3, 3)
    (in_training(ids) * factors).sum().backward()
    expected = torch.zeros(10, 3).index_add(0, ids.flatten(), factors.view(6, 3))
    expected[0] = 0  # padding is not trained
    torch.testing.assert_close(table.weight.grad, expected)


# --- the step --------------------------------------------------------------------------------


def test_table_qat_without_improvement_stores_the_tensors_of_the_rowwise_step(tmp_path):
    """So any difference between the two steps is an effect of training."""
    bench = RANKER.bench(tmp_path / "data")
    unchanged_training = Training(epochs=1, learning_rate=1e-30)
    step = TableQAT(training=unchanged_training, soft_share=0, rows_per_scale=8)
    trained = run(step, RANKER.model(), bench, tmp_path / "qat")
    run(RowwiseInt4(rows_per_scale=8), RANKER.model(), bench, tmp_path / "rowwise")
    torch.testing.assert_close(
        map_tensors(tmp_path / "qat"), map_tensors(tmp_path / "rowwise"), rtol=0, atol=0
    )
    unchanged = Reason("training_unchanged", epochs=1)
    assert trained.plan.of("user").reasons == (Reason("selected", step="table_qat"), unchanged)


def test_the_metric_in_the_plan_is_measured_with_the_stored_tables(tmp_path):
    bench = COMPACT.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"epochs": 3})
    step = TableQAT(bits=2, training=training)
    result = run(step, COMPACT.model(), bench, tmp_path / "out")
    actual = quality(result.module, COMPACT.signature, bench.validation)
    line = next(line for line in result.plan.lines if line.format == "rowwise_int2")
    require_reason(line.reasons, "trained_to_epoch", after=pytest.approx(actual))


# --- the gain over rounding after training ---------------------------------------------------

ROWS, DIM = 2048, 4


class LargeAndSmallWeightsNet(nn.Module):
    """A table whose rows have a large weight that hardly matters next to small ones that do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.item = nn.Embedding(64, DIM)
        self.out = nn.Linear(DIM, 1)
        with torch.no_grad():
            self.item.weight.copy_(0.3 * torch.randn(64, DIM, generator=generator))
            self.item.weight[:, 0] = 3.0
            self.out.weight.copy_(torch.tensor([[0.01, 1.0, -1.0, 1.0]]))
            self.out.bias.zero_()

    def forward(self, item: Tensor) -> Tensor:
        score: Tensor = self.out(self.item(item)).squeeze(1)
        return score


SIGNATURE = Signature(
    inputs=(IdInput(name="item", table="item"),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
LARGE_AND_SMALL = Reference(LargeAndSmallWeightsNet, SIGNATURE)


def labelled_rows(folder: Path, seed: int) -> Split:
    """Rows labelled 1 if the float network's score is above its mean."""
    item = torch.randint(64, (ROWS,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        score = LARGE_AND_SMALL.model().module(item)
    label = (score > score.mean()).float()
    folder.mkdir(parents=True)
    save_file({"item": item, "@label": label, "score": score}, folder / "data.safetensors")
    return Split(path=str(folder), sha256="0" * 64, rows=ROWS)


@pytest.mark.parametrize("soft_share", [0.0, 0.5])
def test_table_qat_loses_less_than_half_of_the_auc_that_rounding_loses(soft_share, tmp_path):
    train, validation, test = (labelled_rows(tmp_path / str(seed), seed) for seed in (1, 2, 3))
    bench = Bench(signature=SIGNATURE, train=train, validation=validation, soft_labels=train)
    source = LARGE_AND_SMALL.model()
    same_levels = RowwiseInt2(symmetric=True, clipping="min_max")
    rounded = run(same_levels, source, bench, tmp_path / "rounded")
    training = Training(epochs=20, patience=20, batch=256, learning_rate=0.05, warmup=0)
    step = TableQAT(bits=2, soft_share=soft_share, training=training)
    trained = run(step, source, bench, tmp_path / "trained")
    lost = {
        name: 1 - quality(model.module, SIGNATURE, test)
        for name, model in {"rounded": rounded, "trained": trained}.items()
    }
    assert quality(source.module, SIGNATURE, test) == 1.0
    assert lost["rounded"] > 0.1  # most of the small weights are rounded to zero
    assert lost["trained"] < lost["rounded"] / 2
    assert stored_bytes(trained.module) == stored_bytes(rounded.module)


def stored_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
