"""``refit_codes``: training of codebooks and scales, reassignment of codes by loss gradients.

A round trains the codebooks and scales, then gives new codes to the share ``share`` of the rows
whose loss they would lower. The file also tests how ``fine_tune`` trains packed tables, which are
stored as codes. A composed table consists of smaller tables, its parts. A format's ``learned`` are
the names of its tensors that training may change. Some tests set the damping of reassignments (a
term added to the curvature) to 0, so that the proposed gains are those of ``predicted_change``.

The networks are those of ``models.py``. ``COMPACT`` has the tables ``item`` (300 rows of 7 numbers)
and ``genres``, and dense layers such as ``cross``. ``RANKER`` has the same table ``item`` and more
tables and bags.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from error_codes import raises_code
from models import (
    ATTENTION,
    COMPACT,
    MULTI_TASK,
    NORMED,
    RANKER,
    SHORT_TRAINING,
    Reference,
    write_split,
)
from multi_task_network import MultiTaskNet
from pydantic import ValidationError
from reason_codes import require_reason
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.batches import Rows
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.modules.formats import PackedTable
from compressors.core.registries import TABLE_FORMATS
from compressors.core.runner import run
from compressors.core.steps.step import TableStep
from compressors.core.steps.table_encoder import encode_table
from compressors.core.units import Unit
from compressors.distill import code_reassignment
from compressors.distill.code_reassignment import ProposedCodes, propose, reassign_codes
from compressors.distill.fine_tune import FineTune
from compressors.distill.refit_codes import RefitCodes, _cast
from compressors.distill.training.settings import Training
from compressors.errors.compression import NothingToCompress
from compressors.factorize.low_rank import LowRank
from compressors.factorize.quotient_remainder import QuotientRemainder
from compressors.metrics.validation_score import quality
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.calibration.loss_gradients import loss_gradients
from compressors.quantize.kernels.bitpacking import pack
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.task_kinds.loss import hard_loss

CODEBOOK_FORMATS = (
    KMeans(bits=2),
    KMeans(bits=2, scale="none"),
    ProductCodes(),
    ProductCodes(parts=3, bits=2, codebook_type="float16"),
    ResidualCodes(),
)
ROWWISE_FORMATS = (
    RowwiseInt8(symmetric=False, rows_per_scale=4),
    RowwiseInt4(),
    RowwiseInt4(symmetric=False, scale="float32", rows_per_scale=0),
    RowwiseInt2(symmetric=True, clipping="min_max"),
    # With a scale and an offset per row, rows of few columns would take more bytes than in int4.
    RowwiseInt2(rows_per_scale=4),
)
each_format = pytest.mark.parametrize(
    "table_step",
    [*CODEBOOK_FORMATS, *ROWWISE_FORMATS],
    ids=lambda step: f"{step.kind}-{getattr(step, 'bits', '')}",
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return COMPACT.bench(tmp_path / "data")


@pytest.fixture
def ranker_bench(tmp_path: Path) -> Bench:
    return RANKER.bench(tmp_path / "ranker")


def pack_tables(
    step: TableStep, bench: Bench, folder: Path, reference: Reference = COMPACT
) -> Model:
    """Return a reference network after a step that compresses its tables."""
    return run(step, reference.model(), bench, folder / "packed")


def validation_quality(model: Model, bench: Bench) -> float:
    """Return the metric of the signature on the validation rows."""
    return quality(model.module, bench.signature, bench.validation)


@each_format
def test_refitting_improves_quality_and_keeps_formats_and_dtypes(table_step, bench, tmp_path):
    """The labels are the opposite of the network's predictions, so quality can increase a lot."""
    before = pack_tables(table_step, bench, tmp_path)
    after = run(RefitCodes(training=SHORT_TRAINING), before, bench, tmp_path / "out")
    assert validation_quality(after, bench) > validation_quality(before, bench) + 0.2
    assert after.network.modules == before.network.modules
    old, new = before.module.state_dict(), after.module.state_dict()
    assert {name: t.dtype for name, t in new.items()} == {name: t.dtype for name, t in old.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    learned = TABLE_FORMATS[table_step.storage.name].learned
    assert any(name.endswith(learned) for name in changed)
    # The levels of int8 are so fine that training scales may be enough.
    if table_step.kind != "rowwise_int8":
        assert any(name.endswith("codes") for name in changed)
    tables = {line.module for line in before.plan.lines if line.format == table_step.kind}
    assert {name.partition(".")[0] for name in changed} <= tables
    for line in after.plan.lines:
        if line.module in tables:
            assert line.steps == (table_step.kind, "refit_codes")
            assert line.bytes_after == before.plan.of(line.module).bytes_after


@pytest.mark.parametrize("reference", [NORMED, ATTENTION], ids=lambda item: item.network.__name__)
def test_refitting_improves_probability_and_ranking_models(reference, tmp_path):
    bench = reference.bench(tmp_path / "data")
    before = pack_tables(ProductCodes(), bench, tmp_path, reference)
    after = run(RefitCodes(training=SHORT_TRAINING), before, bench, tmp_path / "out")
    assert validation_quality(after, bench) > validation_quality(before, bench) + 0.1


def test_dense_layers_are_trained_only_with_dense_true(bench, tmp_path):
    before = pack_tables(ProductCodes(), bench, tmp_path)
    for dense in (False, True):
        step = RefitCodes(training=SHORT_TRAINING, rounds=1, dense=dense)
        after = run(step, before, bench, tmp_path / str(dense))
        is_unchanged = torch.equal(after.module.cross.weight, before.module.cross.weight)
        assert is_unchanged != dense
        line = after.plan.of("cross")
        assert ("refit_codes" in line.steps) == dense
        assert line.format == "float32"


def test_refitting_with_share_zero_keeps_codes_and_trains_codebooks(bench, tmp_path):
    before = pack_tables(ProductCodes(), bench, tmp_path)
    after = run(RefitCodes(training=SHORT_TRAINING, share=0), before, bench, tmp_path / "out")
    assert torch.equal(after.module.item.codes, before.module.item.codes)
    assert not torch.equal(after.module.item.codebook, before.module.item.codebook)


def test_refitting_never_lowers_the_validation_quality(bench, tmp_path):
    """Validation labels agree with the network's predictions, training labels are the opposite."""
    like_predictions = models.write_split(
        COMPACT.signature,
        COMPACT.rows_of_tables(),
        tmp_path / "v",
        seed=8,
        score_function=lambda inputs: -COMPACT.label_scores(inputs),
    )
    bench = bench.model_copy(update={"validation": like_predictions})
    before = pack_tables(ProductCodes(parts=6, bits=4), bench, tmp_path)
    after = run(RefitCodes(training=SHORT_TRAINING), before, bench, tmp_path / "out")
    assert validation_quality(before, bench) > 0.9
    assert validation_quality(after, bench) == validation_quality(before, bench)
    assert after.plan.of("item").steps == ("product_codes",)  # no epoch was better
    assert torch.equal(after.module.item.codes, before.module.item.codes)


def test_only_matching_tables_with_codes_are_refitted_and_other_tables_have_a_reason(
    ranker_bench, tmp_path
):
    bench = ranker_bench
    before = run(BFloat16(tables=("user",)), RANKER.model(), bench, tmp_path / "user")
    before = run(ProductCodes(tables=("item", "tags")), before, bench, tmp_path / "item")
    after = run(
        RefitCodes(tables=("item", "user"), training=SHORT_TRAINING, rounds=1),
        before,
        bench,
        tmp_path / "x",
    )
    require_reason(after.plan.of("item").reasons, "refitted", step="refit_codes", rounds=1)
    assert torch.equal(after.module.tags.table.codes, before.module.tags.table.codes)
    decisions = RefitCodes(tables=("item", "user")).plan(before, bench).decisions
    require_reason(decisions["user"].reasons, "no_codes", format="bfloat16")
    for name in ("city", "tags"):
        require_reason(decisions[name].reasons, "not_matched", patterns=("item", "user"))


def test_a_pattern_that_matches_a_table_selects_its_parts(ranker_bench, tmp_path):
    bench, tables = ranker_bench, ("item", "tags")
    tiers = run(Tiers(tables=tables), RANKER.model(), bench, tmp_path / "tiers")
    before = run(RowwiseInt4(tables=tables), tiers, bench, tmp_path / "packed")
    decisions = RefitCodes(tables=("item",)).plan(before, bench).decisions
    assert {name for name, choice in decisions.items() if choice.selected} == {
        "item.hot",
        "item.cold",
    }


@pytest.mark.parametrize(
    "composing_step", [Tiers(), LowRank(), QuotientRemainder()], ids=lambda s: s.kind
)
def test_codes_of_parts_are_refitted_and_their_composed_table_is_unchanged(
    composing_step, bench, tmp_path
):
    composed = run(composing_step, COMPACT.model(), bench, tmp_path / "composed")
    before = run(RowwiseInt2(rows_per_scale=4), composed, bench, tmp_path / "packed")
    after = run(RefitCodes(training=SHORT_TRAINING, rounds=1), before, bench, tmp_path / "refitted")
    parts = {unit.name for unit in Unit.of(after.module) if unit.part_of}
    changed = {line.module for line in after.plan.lines if "refit_codes" in line.steps}
    assert changed & parts
    # Parts with the fewest columns are stored as int4, which takes no more bytes than int2 there.
    formats = ("rowwise_int2", "rowwise_int4")
    assert changed <= {unit.name for unit in Unit.of(after.module) if unit.format in formats}


def test_refitting_without_codes_raises_nothing_to_compress(bench, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(RefitCodes(), COMPACT.model(), bench, tmp_path)
    assert caught.value.fields["reasons"]["item"] == (Reason("no_codes", format="float32"),)


def test_the_dry_run_of_refitting_has_the_plan_of_its_result(bench, tmp_path):
    before = pack_tables(ProductCodes(), bench, tmp_path)
    step = RefitCodes(training=SHORT_TRAINING, rounds=1)
    assert dry_run(step, before, bench).plan == run(step, before, bench, tmp_path / "x").plan


def test_an_interrupted_refit_resumes_and_ends_with_the_same_bits(bench, tmp_path, monkeypatch):
    before = pack_tables(ProductCodes(), bench, tmp_path)
    step = RefitCodes(training=SHORT_TRAINING, rounds=2)
    uninterrupted = run(step, before, bench, tmp_path / "whole")
    resumable_bench = bench.model_copy(update={"checkpoints": str(tmp_path / "progress")})
    calls: list[int] = []

    def propose_or_interrupt(*args: Any) -> ProposedCodes:
        calls.append(1)
        if len(calls) > 2:  # the two tables of the first round
            raise KeyboardInterrupt
        return propose(*args)

    monkeypatch.setattr("compressors.distill.refit_codes.propose", propose_or_interrupt)
    with pytest.raises(KeyboardInterrupt):  # in the second round, after its training
        run(step, before, resumable_bench, tmp_path / "killed")
    monkeypatch.undo()
    resumed = run(step, before, resumable_bench, tmp_path / "again")
    for name, tensor in uninterrupted.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name


def test_a_share_above_one_raises_a_validation_error():
    with pytest.raises(ValidationError):
        RefitCodes(share=1.5)


# --- gradients and reassigned codes ------------------------------------------------------------


def test_rows_without_a_label_do_not_enlarge_the_squared_gradients(tmp_path):
    """The reference is autograd on the labelled rows, one at a time."""
    like = MULTI_TASK.signature.outputs[1].model_copy(update={"loss_weight": 1.0})
    signature = MULTI_TASK.signature.model_copy(update={"outputs": (like,)})
    split = write_split(signature, MULTI_TASK.rows_of_tables(), tmp_path)

    class LikeNet(MultiTaskNet):
        def forward(self, **inputs: Tensor) -> Tensor:
            return super().forward(**inputs)[1]

    module = replace(MULTI_TASK, network=LikeNet).model().module

    def loss(output: Tensor, batch, row_numbers: Tensor) -> Tensor:
        return hard_loss(signature, output, batch)

    actual = loss_gradients(module, signature, split, loss, {"item": module.item})["item"]
    rows = Rows(split, signature)
    labelled = torch.nonzero(~rows.label.isnan()).reshape(-1)
    assert len(labelled) < len(rows)
    gradient, squares = torch.zeros_like(actual[0]), torch.zeros_like(actual[1])
    for number in labelled:
        batch = rows.take(number.reshape(1))
        loss_of_row = hard_loss(signature, module(**batch.inputs), batch)
        (of_row,) = torch.autograd.grad(loss_of_row, [module.item.weight])
        gradient += of_row / len(labelled)
        squares += of_row.square() / len(labelled)
    torch.testing.assert_close(actual[0], gradient, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(actual[1], squares, rtol=1e-4, atol=1e-10)


def test_loss_gradients_equal_torchs_gradients_of_the_decoded_table(ranker_bench, tmp_path):
    """The reference is autograd on the decoded table, one data row at a time."""
    bench = ranker_bench
    model = pack_tables(ProductCodes(tables=("item", "history")), bench, tmp_path, RANKER)
    tables = {"item": model.module.item, "history": model.module.history.table}

    def loss(output: Tensor, batch, row_numbers: Tensor) -> Tensor:
        return hard_loss(bench.signature, output, batch)

    gradients = loss_gradients(model.module, bench.signature, bench.train, loss, tables)
    reference_module = model.private().module  # a copy of the module tree
    with torch.no_grad():
        item = nn.Embedding.from_pretrained(tables["item"](torch.arange(300)), freeze=False)
    reference_module.item = item
    rows = Rows(bench.train, bench.signature)
    gradient, squares = torch.zeros(300, 7), torch.zeros(300, 7)
    for number in range(len(rows)):
        batch = rows.take(torch.tensor([number]))
        item.weight.grad = None
        hard_loss(bench.signature, reference_module(**batch.inputs), batch).backward()
        gradient += item.weight.grad
        squares += item.weight.grad.square()
    torch.testing.assert_close(gradients["item"][0], gradient / len(rows), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(gradients["item"][1], squares / len(rows), rtol=1e-4, atol=1e-10)
    assert gradients["history"][1].sum() > 0
    assert not any(module._forward_hooks for module in model.module.modules())


def random_table(step: TableStep, rows: int = 200, dim: int = 6) -> PackedTable:
    """Return a table of random rows as the step stores it."""
    table = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    params = step.fit(table)
    layout = step.storage.layout(rows, dim, step.settings())
    # ``spec.rows_per_entry`` is 0 for tensors of the whole table, which ``fit`` computes.
    stored = {name: params[name] for name, spec in layout.items() if not spec.rows_per_entry}
    stored |= step.encode(table, params)
    return PackedTable(step.storage, rows, dim, step.settings(), stored)


def predicted_change(
    table: PackedTable, gradient: Tensor, curvature: Tensor, initial_rows: Tensor
) -> Tensor:
    """Change of the quadratic approximation of the loss from ``initial_rows``: ``(rows,)``.

    ``gradient`` and ``curvature`` (mean squared gradients) are ``(rows, dim)``. The factor ``dim``
    makes the approximation an upper bound; see ``distill/code_reassignment.py``.
    """
    with torch.no_grad():
        change = table(torch.arange(table.rows)) - initial_rows
    return (gradient * change + table.dim * curvature * change.square() / 2).sum(dim=1)


def random_gradients(seed: int) -> tuple[Tensor, Tensor]:
    """Return a gradient and a positive curvature for each number of ``random_table``."""
    generator = torch.Generator().manual_seed(seed)
    gradient = 3 * torch.randn(200, 6, generator=generator)
    return gradient, torch.rand(200, 6, generator=generator) + 0.1


@each_format
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_reassigned_rows_lower_the_quadratic_approximation_of_the_loss(
    table_step, share, monkeypatch
):
    monkeypatch.setattr(code_reassignment, "DAMPING", 0.0)
    table = random_table(table_step)
    gradient, curvature = random_gradients(1)
    gradient[::4] = curvature[::4] = 0  # rows without lookups
    with torch.no_grad():
        initial_rows = table(torch.arange(200))
    before = table.codes.clone()
    proposal = propose(table, gradient, curvature)
    new, rows = reassign_codes(table, proposal, share)
    assert torch.equal(table.codes, before)  # the table is not modified
    table.codes = new
    change = predicted_change(table, gradient, curvature, initial_rows)
    is_changed = (new != before).any(dim=1)
    assert int(is_changed.sum()) == rows == round(share * int((proposal.gain > 0).sum()))
    assert rows > 10
    assert not is_changed[::4].any()
    assert torch.all(change[is_changed] < 0)
    torch.testing.assert_close(-change[is_changed], proposal.gain[is_changed], rtol=1e-3, atol=1e-4)
    assert proposal.gain[is_changed].min() >= proposal.gain[~is_changed].max()


@pytest.mark.parametrize("table_step", [KMeans(bits=2, scale="none"), ProductCodes(parts=3)])
def test_reassigned_codes_equal_a_search_of_all_entries(table_step, monkeypatch):
    """The formats assign one entry per part, so the best entry can be found by a search."""
    monkeypatch.setattr(code_reassignment, "DAMPING", 0.0)
    table = random_table(table_step)
    gradient, curvature = random_gradients(2)
    with torch.no_grad():
        initial_rows = table(torch.arange(200))
    best = torch.zeros(200)
    # Columns per code: KMeans has a code per column, ProductCodes three codes for six columns.
    width = 1 if table_step.kind == "kmeans" else 2
    for part in range(6 // width):
        columns = slice(part * width, (part + 1) * width)
        entries = table.codebook.reshape(-1, 1)
        if table_step.kind != "kmeans":
            entries = table.codebook.reshape(3, -1, 2)[part]
        difference = entries[None] - initial_rows[:, None, columns]
        squares = table.dim * curvature[:, None, columns] * difference.square() / 2
        best += (gradient[:, None, columns] * difference + squares).sum(dim=2).amin(dim=1)
    table.codes, _ = reassign_codes(table, propose(table, gradient, curvature), 1.0)
    change = predicted_change(table, gradient, curvature, initial_rows)
    torch.testing.assert_close(change, best, rtol=1e-4, atol=1e-4)


def test_zero_gradients_reassign_no_codes():
    table = random_table(ProductCodes())
    zero_gradient = torch.zeros(200, 6)
    codes, rows = reassign_codes(table, propose(table, zero_gradient, zero_gradient), 1.0)
    assert rows == 0
    assert torch.equal(codes, table.codes)


def test_reassignments_that_raise_the_loss_are_undone(bench, tmp_path, monkeypatch):
    before = pack_tables(ProductCodes(parts=6, bits=4), bench, tmp_path)
    teacher = COMPACT.model().module
    rows = Rows(bench.train, bench.signature)
    with torch.no_grad():
        scores = teacher(**rows.take(torch.arange(len(rows))).inputs).reshape(-1)
    folder = tmp_path / "scores"
    folder.mkdir()
    save_file({"score": scores}, folder / "data.safetensors")
    bench = bench.model_copy(
        update={"soft_labels": bench.soft_labels.model_copy(update={"path": str(folder)})}
    )

    def propose_worse_codes(
        table: PackedTable, gradient: Tensor, curvature: Tensor
    ) -> ProposedCodes:
        return propose(table, -100 * gradient, curvature)  # codes that increase the loss

    step = RefitCodes(training=SHORT_TRAINING, rounds=1)
    model = before.private()  # a copy of the module tree, so that ``before`` keeps its codes
    tables = {"item": model.module.item, "genres": model.module.genres}
    monkeypatch.setattr("compressors.distill.refit_codes.propose", propose_worse_codes)
    assert step._reassign_codes(model, bench, tables) == 0  # number of rows with new codes
    assert torch.equal(model.module.item.codes, before.module.item.codes)
    monkeypatch.undo()
    assert step._reassign_codes(model, bench, tables) > 0
    assert not torch.equal(model.module.item.codes, before.module.item.codes)


# --- fine-tuning of packed tables --------------------------------------------------------------

TRAIN_TABLES = SHORT_TRAINING.model_copy(update={"tables": True})


@pytest.mark.parametrize(
    "table_step", [KMeans(scale="float32"), ProductCodes(), ResidualCodes()], ids=lambda s: s.kind
)
def test_fine_tuning_trains_codebooks_only_with_tables_true(table_step, bench, tmp_path):
    before = pack_tables(table_step, bench, tmp_path)
    after = run(FineTune(training=TRAIN_TABLES), before, bench, tmp_path / "out")
    assert validation_quality(after, bench) > validation_quality(before, bench)
    for name in table_step.storage.learned:
        if name in before.module.item._buffers:
            assert not torch.equal(
                after.module.item._buffers[name], before.module.item._buffers[name]
            )
    assert torch.equal(after.module.item.codes, before.module.item.codes)
    assert "fine_tune" in after.plan.of("item").steps
    trained_dense_only = run(FineTune(training=SHORT_TRAINING), before, bench, tmp_path / "dense")
    assert torch.equal(trained_dense_only.module.item.codebook, before.module.item.codebook)


def test_float16_codebooks_are_not_trained_and_the_plan_has_a_reason(bench, tmp_path):
    before = pack_tables(ProductCodes(codebook_type="float16"), bench, tmp_path)
    after = run(FineTune(training=TRAIN_TABLES), before, bench, tmp_path / "out")
    assert torch.equal(after.module.item.codebook, before.module.item.codebook)
    choice = FineTune(training=TRAIN_TABLES).plan(before, bench).decisions["item"]
    assert not choice.selected
    reason = require_reason(
        choice.reasons, "trains_float32_only", step="fine_tune", dtype="float16"
    )
    assert (reason.fields["tensor"], reason.fields["format"]) == ("codebook", "product_codes")


def test_table_l2_lowers_the_norm_of_packed_tables(bench, tmp_path):
    before = pack_tables(ResidualCodes(), bench, tmp_path)
    norms = []
    for penalty in (0.0, 0.1):
        training = Training(batch=16, learning_rate=0.02, warmup=0, tables=True, table_l2=penalty)
        after = run(FineTune(training=training), before, bench, tmp_path / str(penalty))
        with torch.no_grad():
            norms.append(float(after.module.item(torch.arange(300)).norm()))
    assert norms[1] < 0.9 * norms[0]


def test_weight_decay_does_not_change_unread_codebook_entries(bench, tmp_path):
    """Otherwise, entries that no training row reads would shrink."""
    before = pack_tables(ProductCodes(parts=7), bench, tmp_path)
    training = TRAIN_TABLES.model_copy(update={"weight_decay": 0.5, "epochs": 1})
    after = run(FineTune(training=training), before, bench, tmp_path / "out")
    rows = Rows(bench.train, bench.signature)
    codes_read = before.module.item.codes[rows.take(torch.arange(len(rows))).inputs["item"]]
    entries = len(before.module.item.codebook) // 7
    entries_read = (codes_read.long() + torch.arange(7) * entries).unique()
    is_unread = torch.ones(len(before.module.item.codebook), dtype=torch.bool)
    is_unread[entries_read] = False
    assert bool(is_unread.any())
    old, new = before.module.item.codebook, after.module.item.codebook
    assert torch.equal(new[is_unread], old[is_unread])
    assert not torch.equal(new[~is_unread], old[~is_unread])


@pytest.mark.parametrize("table_step", ROWWISE_FORMATS, ids=lambda step: step.kind)
def test_nearest_uniform_codes_equal_a_search_of_all_levels(table_step):
    """The expected distance is the smallest over all codes, tried one after another."""
    generator = torch.Generator().manual_seed(5)
    table = encode_table(table_step, torch.randn(12, 6, generator=generator))
    given_rows = 1.5 * torch.randn(12, 6, generator=generator)  # the codes should represent them
    new, values = code_reassignment.nearest_uniform_codes(table, given_rows)
    bits = table_step.storage.bits
    signed = new.dtype == torch.int8
    all_codes = torch.arange(-127, 128) if signed else torch.arange(2**bits)
    if bits == 4 and table_step.symmetric:
        all_codes = all_codes[1:]  # the lowest code is not used
    errors = []
    for code in all_codes.tolist():
        filled = torch.full_like(new, code)
        table.codes = filled if bits == 8 else pack(filled, bits)
        errors.append((table(torch.arange(12)) - given_rows).abs())
    best = torch.stack(errors).amin(dim=0)
    table.codes = new if bits == 8 else pack(new, bits)
    with torch.no_grad():
        decoded = table(torch.arange(12))
    assert torch.equal(decoded, values)
    # Distances are compared, because for ties between two levels the codes depend on rounding.
    torch.testing.assert_close((decoded - given_rows).abs(), best, rtol=1e-5, atol=1e-6)


def test_a_trained_scale_is_clamped_to_the_positive_range_of_float16():
    table = encode_table(
        RowwiseInt4(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    )
    table.scale = torch.tensor([[1e-9], [0.5], [1e9]])
    _cast(table, {"scale": torch.float16})
    assert table.scale.squeeze(1).tolist() == [2.0**-24, 0.5, 65504.0]
