"""Codebooks and codes fitted to the task: what moves, what stays, and that nothing gets worse."""

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from error_codes import raises_code
from models import ATTENTION, COMPACT, NORMED, QUICKLY, RANKER, Reference
from pydantic import ValidationError
from reason_codes import with_code
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
from compressors.distill.code_reassignment import Proposal, propose, reassigned_codes
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

CODES = (
    KMeans(bits=2),
    KMeans(bits=2, scale="none"),
    ProductCodes(),
    ProductCodes(parts=3, bits=2, codebook_type="float16"),
    ResidualCodes(),
)
ROWWISE = (
    RowwiseInt8(symmetric=False, rows_per_scale=4),
    RowwiseInt4(),
    RowwiseInt4(symmetric=False, scale="float32", rows_per_scale=0),
    RowwiseInt2(symmetric=True, clipping="min_max"),
    RowwiseInt2(rows_per_scale=4),  # an offset each row makes narrow rows larger than int4
)
each_codes = pytest.mark.parametrize(
    "codes", [*CODES, *ROWWISE], ids=lambda step: f"{step.kind}-{getattr(step, 'bits', '')}"
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return COMPACT.bench(tmp_path / "data")


@pytest.fixture
def ranker_bench(tmp_path: Path) -> Bench:
    return RANKER.bench(tmp_path / "ranker")


def packed(step: TableStep, bench: Bench, folder: Path, reference: Reference = COMPACT) -> Model:
    return run(step, reference.model(), bench, folder / "packed")


def judged(model: Model, bench: Bench) -> float:
    return quality(model.module, bench.signature, bench.validation)


@each_codes
def test_codebooks_and_codes_learn_and_formats_stay(codes, bench, tmp_path):
    """The labels are the opposite of the network's predictions, so there is much to learn."""
    before = packed(codes, bench, tmp_path)
    after = run(RefitCodes(training=QUICKLY), before, bench, tmp_path / "out")
    assert judged(after, bench) > judged(before, bench) + 0.2
    assert after.network.modules == before.network.modules
    old, new = before.module.state_dict(), after.module.state_dict()
    assert {name: t.dtype for name, t in new.items()} == {name: t.dtype for name, t in old.items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    learned = TABLE_FORMATS[codes.storage.name].learned
    assert any(name.endswith(learned) for name in changed)
    if codes.kind != "rowwise_int8":  # whose levels are so fine that scales alone may do
        assert any(name.endswith("codes") for name in changed)
    tables = {line.module for line in before.plan.lines if line.format == codes.kind}
    assert {name.partition(".")[0] for name in changed} <= tables
    for line in after.plan.lines:
        if line.module in tables:
            assert line.steps == (codes.kind, "refit_codes")
            assert line.bytes_after == before.plan.of(line.module).bytes_after


@pytest.mark.parametrize("reference", [NORMED, ATTENTION], ids=lambda item: item.network.__name__)
def test_probabilities_and_lists_are_refitted_as_well(reference, tmp_path):
    bench = reference.bench(tmp_path / "data")
    before = packed(ProductCodes(), bench, tmp_path, reference)
    after = run(RefitCodes(training=QUICKLY), before, bench, tmp_path / "out")
    assert judged(after, bench) > judged(before, bench) + 0.1


def test_dense_layers_are_trained_only_with_dense_true(bench, tmp_path):
    before = packed(ProductCodes(), bench, tmp_path)
    for dense in (False, True):
        step = RefitCodes(training=QUICKLY, rounds=1, dense=dense)
        after = run(step, before, bench, tmp_path / str(dense))
        same = torch.equal(after.module.cross.weight, before.module.cross.weight)
        assert same != dense
        line = after.plan.of("cross")
        assert ("refit_codes" in line.steps) == dense
        assert line.format == "float32"


def test_without_a_share_codes_stay(bench, tmp_path):
    before = packed(ProductCodes(), bench, tmp_path)
    after = run(RefitCodes(training=QUICKLY, share=0), before, bench, tmp_path / "out")
    assert torch.equal(after.module.item.codes, before.module.item.codes)
    assert not torch.equal(after.module.item.codebook, before.module.item.codebook)


def test_it_ends_no_worse_on_the_validation_rows_than_it_began(bench, tmp_path):
    """Validation labels agree with the network's predictions, training labels are the opposite."""
    turned = models.prepared(
        COMPACT.signature,
        COMPACT.rows_of_tables(),
        tmp_path / "v",
        8,
        lambda x: -COMPACT._opposite(x),
    )
    bench = bench.model_copy(update={"validation": turned})
    before = packed(ProductCodes(parts=6, bits=4), bench, tmp_path)
    after = run(RefitCodes(training=QUICKLY), before, bench, tmp_path / "out")
    assert judged(before, bench) > 0.9
    assert judged(after, bench) == judged(before, bench)
    assert after.plan.of("item").steps == ("product_codes",)  # nothing better was found
    assert torch.equal(after.module.item.codes, before.module.item.codes)


def test_only_tables_with_codebooks_are_taken_and_the_others_say_why(ranker_bench, tmp_path):
    bench = ranker_bench
    before = run(BFloat16(tables=("user",)), RANKER.model(), bench, tmp_path / "user")
    before = run(ProductCodes(tables=("item", "tags")), before, bench, tmp_path / "item")
    after = run(
        RefitCodes(tables=("item", "user"), training=QUICKLY, rounds=1),
        before,
        bench,
        tmp_path / "x",
    )
    with_code(after.plan.of("item").reasons, "refitted", step="refit_codes", rounds=1)
    assert torch.equal(after.module.tags.table.codes, before.module.tags.table.codes)
    chosen = RefitCodes(tables=("item", "user")).plan(before, bench).decisions
    with_code(chosen["user"].reasons, "no_codes", format="bfloat16")
    for name in ("city", "tags"):
        with_code(chosen[name].reasons, "not_matched", patterns=("item", "user"))


def test_a_table_means_its_parts_too(ranker_bench, tmp_path):
    bench, tables = ranker_bench, ("item", "tags")
    tiers = run(Tiers(tables=tables), RANKER.model(), bench, tmp_path / "tiers")
    before = run(RowwiseInt4(tables=tables), tiers, bench, tmp_path / "packed")
    chosen = RefitCodes(tables=("item",)).plan(before, bench).decisions
    assert {name for name, choice in chosen.items() if choice.selected} == {"item.hot", "item.cold"}


@pytest.mark.parametrize("first", [Tiers(), LowRank(), QuotientRemainder()], ids=lambda s: s.kind)
def test_codes_of_parts_are_refitted_and_the_table_they_make_keeps_its_own(first, bench, tmp_path):
    made = run(first, COMPACT.model(), bench, tmp_path / "made")
    before = run(RowwiseInt2(rows_per_scale=4), made, bench, tmp_path / "packed")
    after = run(RefitCodes(training=QUICKLY, rounds=1), before, bench, tmp_path / "refitted")
    parts = {unit.name for unit in Unit.of(after.module) if unit.part_of}
    changed = {line.module for line in after.plan.lines if "refit_codes" in line.steps}
    assert changed & parts
    # Of the narrowest parts int4 takes no more bytes than int2, so those are int4.
    packed = ("rowwise_int2", "rowwise_int4")
    assert changed <= {unit.name for unit in Unit.of(after.module) if unit.format in packed}


def test_without_codebooks_there_is_nothing_to_refit(bench, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(RefitCodes(), COMPACT.model(), bench, tmp_path)
    assert caught.value.fields["reasons"]["item"] == (Reason("no_codes", format="float32"),)


def test_its_plan_is_known_before(bench, tmp_path):
    before = packed(ProductCodes(), bench, tmp_path)
    step = RefitCodes(training=QUICKLY, rounds=1)
    assert dry_run(step, before, bench).plan == run(step, before, bench, tmp_path / "x").plan


def test_a_run_that_was_killed_goes_on_to_the_same_bits(bench, tmp_path, monkeypatch):
    before = packed(ProductCodes(), bench, tmp_path)
    step = RefitCodes(training=QUICKLY, rounds=2)
    whole = run(step, before, bench, tmp_path / "whole")
    kept = bench.model_copy(update={"checkpoints": str(tmp_path / "progress")})
    calls: list[int] = []

    def killed(*args: Any) -> Proposal:
        calls.append(1)
        if len(calls) > 2:  # the two tables of the first round
            raise KeyboardInterrupt
        return propose(*args)

    monkeypatch.setattr("compressors.distill.refit_codes.propose", killed)
    with pytest.raises(KeyboardInterrupt):  # in the second round, after its training
        run(step, before, kept, tmp_path / "killed")
    monkeypatch.undo()
    again = run(step, before, kept, tmp_path / "again")
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name]), name


def test_a_share_is_a_share():
    with pytest.raises(ValidationError):
        RefitCodes(share=1.5)


# --- slopes and moves --------------------------------------------------------------------------


def test_slopes_are_the_gradients_of_the_table_the_codes_stand_for(ranker_bench, tmp_path):
    """Against plain torch: the decoded table as a parameter, one row of data at a time."""
    bench = ranker_bench
    model = packed(ProductCodes(tables=("item", "history")), bench, tmp_path, RANKER)
    tables = {"item": model.module.item, "history": model.module.history.table}

    def loss(output: Tensor, batch, numbers: Tensor) -> Tensor:
        return hard_loss(bench.signature, output, batch)

    found = loss_gradients(model.module, bench.signature, bench.train, loss, tables)
    plain = model.private().module
    with torch.no_grad():
        item = nn.Embedding.from_pretrained(tables["item"](torch.arange(300)), freeze=False)
    plain.item = item
    rows = Rows(bench.train, bench.signature)
    slope, squares = torch.zeros(300, 7), torch.zeros(300, 7)
    for number in range(len(rows)):
        batch = rows.take(torch.tensor([number]))
        item.weight.grad = None
        hard_loss(bench.signature, plain(**batch.inputs), batch).backward()
        slope += item.weight.grad
        squares += item.weight.grad.square()
    torch.testing.assert_close(found["item"][0], slope / len(rows), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found["item"][1], squares / len(rows), rtol=1e-4, atol=1e-10)
    assert found["history"][1].sum() > 0
    assert not any(module._forward_hooks for module in model.module.modules())


def drawn(step: TableStep, rows: int = 200, dim: int = 6) -> PackedTable:
    table = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    params = step.fit(table)
    layout = step.storage.layout(rows, dim, step.settings())
    stored = {name: params[name] for name, spec in layout.items() if not spec.every}
    stored |= step.encode(table, params)
    return PackedTable(step.storage, rows, dim, step.settings(), stored)


def foreseen(table: PackedTable, slope: Tensor, curvature: Tensor, begun: Tensor) -> Tensor:
    """The model of the loss at what a table reads as now, by row."""
    with torch.no_grad():
        step = table(torch.arange(table.rows)) - begun
    return (slope * step + table.dim * curvature * step.square() / 2).sum(dim=1)


def drawn_slopes(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slope = 3 * torch.randn(200, 6, generator=generator)
    return slope, torch.rand(200, 6, generator=generator) + 0.1


@each_codes
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_rows_that_move_lower_the_model_of_the_loss(codes, share, monkeypatch):
    monkeypatch.setattr(code_reassignment, "DAMPING", 0.0)
    table = drawn(codes)
    slope, curvature = drawn_slopes(1)
    slope[::4] = curvature[::4] = 0  # rows that nothing looks up
    with torch.no_grad():
        begun = table(torch.arange(200))
    before = table.codes.clone()
    proposal = propose(table, slope, curvature)
    new, rows = reassigned_codes(table, proposal, share)
    assert torch.equal(table.codes, before)  # the given ones are left alone
    table.codes = new
    change = foreseen(table, slope, curvature, begun)
    touched = (new != before).any(dim=1)
    assert int(touched.sum()) == rows == round(share * int((proposal.gain > 0).sum()))
    assert rows > 10
    assert not touched[::4].any()
    assert torch.all(change[touched] < 0)
    torch.testing.assert_close(-change[touched], proposal.gain[touched], rtol=1e-3, atol=1e-4)
    assert proposal.gain[touched].min() >= proposal.gain[~touched].max()


@pytest.mark.parametrize("codes", [KMeans(bits=2, scale="none"), ProductCodes(parts=3)])
def test_codes_without_a_sum_move_to_the_best_there_is(codes, monkeypatch):
    """Against a search over every entry."""
    monkeypatch.setattr(code_reassignment, "DAMPING", 0.0)
    table = drawn(codes)
    slope, curvature = drawn_slopes(2)
    with torch.no_grad():
        begun = table(torch.arange(200))
    best = torch.zeros(200)
    width = 1 if codes.kind == "kmeans" else 2
    for part in range(6 // width):
        columns = slice(part * width, (part + 1) * width)
        entries = table.codebook.reshape(-1, 1)
        if codes.kind != "kmeans":
            entries = table.codebook.reshape(3, -1, 2)[part]
        step = entries[None] - begun[:, None, columns]
        squares = 6 * curvature[:, None, columns] * step.square() / 2
        best += (slope[:, None, columns] * step + squares).sum(dim=2).amin(dim=1)
    table.codes, _ = reassigned_codes(table, propose(table, slope, curvature), 1.0)
    found = foreseen(table, slope, curvature, begun)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)


def test_where_nothing_is_looked_up_nothing_moves():
    table = drawn(ProductCodes())
    nothing = torch.zeros(200, 6)
    codes, rows = reassigned_codes(table, propose(table, nothing, nothing), 1.0)
    assert rows == 0
    assert torch.equal(codes, table.codes)


def test_moves_that_raise_the_loss_are_taken_back(bench, tmp_path, monkeypatch):
    before = packed(ProductCodes(parts=6, bits=4), bench, tmp_path)
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

    def wrong(table: PackedTable, slope: Tensor, curvature: Tensor) -> Proposal:
        return propose(table, -100 * slope, curvature)  # uphill

    step = RefitCodes(training=QUICKLY, rounds=1)
    model = before.private()
    tables = {"item": model.module.item, "genres": model.module.genres}
    monkeypatch.setattr("compressors.distill.refit_codes.propose", wrong)
    assert step._reassign_codes(model, bench, tables) == 0
    assert torch.equal(model.module.item.codes, before.module.item.codes)
    monkeypatch.undo()
    assert step._reassign_codes(model, bench, tables) > 0
    assert not torch.equal(model.module.item.codes, before.module.item.codes)


# --- the steps that train, on packed tables ----------------------------------------------------

TABLES = QUICKLY.model_copy(update={"tables": True})


@pytest.mark.parametrize(
    "codes", [KMeans(scale="float32"), ProductCodes(), ResidualCodes()], ids=lambda s: s.kind
)
def test_fine_tuning_trains_codebooks_where_tables_are_trained(codes, bench, tmp_path):
    before = packed(codes, bench, tmp_path)
    after = run(FineTune(training=TABLES), before, bench, tmp_path / "out")
    assert judged(after, bench) > judged(before, bench)
    for name in codes.storage.learned:
        if name in before.module.item._buffers:
            assert not torch.equal(
                after.module.item._buffers[name], before.module.item._buffers[name]
            )
    assert torch.equal(after.module.item.codes, before.module.item.codes)
    assert "fine_tune" in after.plan.of("item").steps
    still = run(FineTune(training=QUICKLY), before, bench, tmp_path / "still")
    assert torch.equal(still.module.item.codebook, before.module.item.codebook)


def test_codebooks_of_float16_say_that_they_are_not_trained(bench, tmp_path):
    before = packed(ProductCodes(codebook_type="float16"), bench, tmp_path)
    after = run(FineTune(training=TABLES), before, bench, tmp_path / "out")
    assert torch.equal(after.module.item.codebook, before.module.item.codebook)
    choice = FineTune(training=TABLES).plan(before, bench).decisions["item"]
    assert not choice.selected
    why = with_code(choice.reasons, "trains_float32_only", step="fine_tune", dtype="float16")
    assert (why.fields["tensor"], why.fields["format"]) == ("codebook", "product_codes")


def test_a_penalty_on_tables_makes_packed_ones_smaller_as_they_are_read(bench, tmp_path):
    before = packed(ResidualCodes(), bench, tmp_path)
    norms = []
    for penalty in (0.0, 0.1):
        how = Training(batch=16, learning_rate=0.02, warmup=0, tables=True, table_l2=penalty)
        after = run(FineTune(training=how), before, bench, tmp_path / str(penalty))
        with torch.no_grad():
            norms.append(float(after.module.item(torch.arange(300)).norm()))
    assert norms[1] < 0.9 * norms[0]


def test_weight_decay_leaves_codebooks_alone(bench, tmp_path):
    """An entry that no training row reads would shrink under it."""
    before = packed(ProductCodes(parts=7), bench, tmp_path)
    how = TABLES.model_copy(update={"weight_decay": 0.5, "epochs": 1})
    after = run(FineTune(training=how), before, bench, tmp_path / "out")
    rows = Rows(bench.train, bench.signature)
    read = before.module.item.codes[rows.take(torch.arange(len(rows))).inputs["item"]]
    entries = len(before.module.item.codebook) // 7
    places = (read.long() + torch.arange(7) * entries).unique()
    unread = torch.ones(len(before.module.item.codebook), dtype=torch.bool)
    unread[places] = False
    assert bool(unread.any())
    old, new = before.module.item.codebook, after.module.item.codebook
    assert torch.equal(new[unread], old[unread])
    assert not torch.equal(new[~unread], old[~unread])


@pytest.mark.parametrize("codes", ROWWISE, ids=lambda step: step.kind)
def test_row_wise_codes_are_the_nearest_levels_there_are(codes):
    """Against every level of every weight, one by one."""
    generator = torch.Generator().manual_seed(5)
    table = encode_table(codes, torch.randn(12, 6, generator=generator))
    target = 1.5 * torch.randn(12, 6, generator=generator)
    new, read = code_reassignment.nearest_uniform_codes(table, target)
    bits = codes.storage.bits
    signed = new.dtype == torch.int8
    every = torch.arange(-127, 128) if signed else torch.arange(2**bits)
    if bits == 4 and codes.symmetric:
        every = every[1:]  # the lowest code is not used
    gaps = []
    for code in every.tolist():
        filled = torch.full_like(new, code)
        table.codes = filled if bits == 8 else pack(filled, bits)
        gaps.append((table(torch.arange(12)) - target).abs())
    best = torch.stack(gaps).amin(dim=0)
    table.codes = new if bits == 8 else pack(new, bits)
    with torch.no_grad():
        found = table(torch.arange(12))
    assert torch.equal(found, read)
    # Only rounding decides ties between two levels.
    torch.testing.assert_close((found - target).abs(), best, rtol=1e-5, atol=1e-6)


def test_a_trained_scale_too_small_for_float16_stays_positive():
    table = encode_table(
        RowwiseInt4(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    )
    table.scale = torch.tensor([[1e-9], [0.5], [1e9]])
    _cast(table, {"scale": torch.float16})
    assert table.scale.squeeze(1).tolist() == [2.0**-24, 0.5, 65504.0]
