"""The contract of every step: all that ``compressors.core.registries`` lists."""

import functools
import itertools
import tempfile
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import models
import pytest
import torch
from error_codes import HasReason, raises_code
from model_scores import stored_bytes
from models import (
    ALONE,
    ATTENTION,
    BY_NAME,
    COMPACT,
    FORMATS,
    METHODS,
    NORMED,
    NOT_ALONE,
    RANKER,
    REFERENCES,
    SEARCHES,
    VALUES,
    Reference,
    Step,
    tensors_apart,
)
from pydantic import TypeAdapter, ValidationError
from reason_codes import codes_of, with_code
from torch import Tensor, nn

from compressors.contracts import Bench, Plan
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.core.state.module_state import load, mapped, records_of, save, tensors_of
from compressors.core.steps.step import Step as WholeStep
from compressors.core.steps.step import TableStep
from compressors.core.units import Unit
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused, ValueNotStorable
from compressors.factorize.low_rank_dense import LowRankDense
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.l1_training import L1Training
from compressors.prune.dense.magnitude import Magnitude
from compressors.prune.dense.sparse_2_4 import Sparse24
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from compressors.quantize.dense.float8_dense import Float8Dense
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.qat import QAT
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.additive_codes import AdditiveCodes
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.rewrite.equalize import Equalize
from compressors.rewrite.fold import Fold
from compressors.rewrite.smooth_quant import SmoothQuant

RECIPES = TypeAdapter(AnyStep)


def takes(method: type[Step]) -> set[str]:
    """Which settings name what a method works on."""
    return {"tables", "layers"} & set(method.model_fields)


# One or two codes a row cannot represent 15 random rows: test_table_codes.py tests these methods.
CODES = {ProductCodes, ResidualCodes, AdditiveCodes}
# Training moves scores to where the labels want them: test_qat.py looks at it.
FINE = tuple(method for method in FORMATS if method not in CODES and method is not QAT)


# In the others the only number that is a layer's width is also the dimension of a table.
WITH_WIDTHS = (RANKER, NORMED)


# Model steps that are not called like the format they write.
WRITES = {"qat": "static_int8", "bfloat16_dense": "bfloat16"}


def form(step: Step) -> str:
    """The format a step writes; additive codes are stored as residual ones are."""
    return step.storage.name if hasattr(step, "storage") else WRITES.get(step.kind, step.kind)


# What finds nothing on the other references says so; each has tests of its own.
ONLY_ON: dict[type[Step], tuple[Reference, ...]] = {
    Channels: WITH_WIDTHS,
    Fold: (NORMED,),
    # Both export the network, which takes the ranker three times as long.
    Equalize: (COMPACT, RANKER),
    SmoothQuant: (COMPACT, RANKER, NORMED),
    LowRankDense: (RANKER, ATTENTION, NORMED),
}


def fits(method: type[Step], reference: Reference) -> bool:
    return reference in references(method)


# In the default tier on every reference: one for tables, one for layers.
ON_EVERY_REFERENCE = (RowwiseInt4, StaticInt8)
# In the default tier before and after every other format.
WITH_EVERY_FORMAT = (RowwiseInt8, StaticInt8, Float16)


def references(method: type[Step]) -> tuple[Reference, ...]:
    return ONLY_ON.get(method, REFERENCES)


def first_reference(method: type[Step]) -> Reference:
    return references(method)[0]


def tier(*values: object, default: bool) -> typing.Any:
    """One case of a test, in the default or in the nightly tier."""
    names = (getattr(value, "__name__", None) or value.network.__name__ for value in values)
    return pytest.param(*values, id="-".join(names), marks=() if default else pytest.mark.nightly)


def pairs(methods: tuple[type[Step], ...]) -> pytest.MarkDecorator:
    """Every one of these methods on every reference that has something for it.

    In the default tier each is on one reference, and two are on all.
    """
    every = [
        tier(m, r, default=r is first_reference(m) or m in ON_EVERY_REFERENCE)
        for m in methods
        for r in references(m)
    ]
    return pytest.mark.parametrize(("method", "reference"), every)


def each(methods: typing.Iterable[type[Step]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.__name__)


every_method = each(METHODS)
every_format = each(FORMATS)
every_pair = pairs(ALONE)
every_format_pair = pairs(FORMATS)
every_values_pair = pairs(VALUES)


@pytest.fixture
def step(method) -> Step:
    return models.default(method)


@pytest.fixture
def bench(reference, tmp_path) -> Bench:
    return reference.bench(tmp_path / "data")


def versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (tensor.data_ptr(), tensor._version) for name, tensor in named}


def scores(model: Model, reference: Reference, rows: int = 9) -> Tensor:
    inputs = models.example(reference.signature, reference.rows_of_tables(), rows, seed=3)
    with torch.no_grad():
        return model.module(**inputs)


_SCRATCH = tempfile.TemporaryDirectory(prefix="steps-")


@dataclass(frozen=True)
class Ran:
    """A method, carried out once on a reference with its default settings.

    ``before`` is what the caller's model was, and ``tensors`` a copy of its tensors.
    """

    source: Model
    before: tuple[object, ...]
    tensors: dict[str, Tensor]
    result: Model
    folder: Path
    bench: Bench


@functools.cache
def ran(method: type[Step], name: str) -> Ran:
    """The result of a method, cached: many tests check it, and training it for each takes long."""
    reference = BY_NAME[name]
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    source = reference.model()
    source.module.train()
    before, tensors = state_of(source), tensors_apart(source.module)
    bench = reference.bench(folder / "data")
    result = run(models.default(method), source, bench, folder / "out")
    return Ran(source, before, tensors, result, folder / "out", bench)


def state_of(model: Model) -> tuple[object, ...]:
    """All of a model that a step must leave as it is, but for the values of its tensors."""
    named = model.module.named_modules()
    return versions(model.module), [(name, id(part), part.training) for name, part in named]


@pytest.fixture
def made(method, reference) -> Ran:
    return ran(method, reference.network.__name__)


def test_every_method_and_every_reference_is_in_the_default_tier():
    default = [case.values for case in every_pair.args[1] if not case.marks]
    assert {method for method, _ in default} == set(ALONE) == set(METHODS) - set(NOT_ALONE)
    assert {reference.network for _, reference in default} == {r.network for r in BY_NAME.values()}
    orders = [case.values[:2] for case in COMPOSED if not case.marks]
    assert {method for pair in orders for method in pair} == set(FORMATS)


# --- what every step keeps -------------------------------------------------------------------


@every_pair
def test_the_callers_model_is_left_alone_bit_for_bit(made):
    assert state_of(made.source) == made.before
    torch.testing.assert_close(tensors_apart(made.source.module), made.tensors, rtol=0, atol=0)


@pairs(FINE)
def test_scores_are_finite_and_near_the_originals(made, reference):
    result = scores(made.result, reference)
    before = scores(reference.model(), reference)
    assert torch.isfinite(result).all()
    assert result.shape == before.shape
    # Four bits keep a weight within 1/14 of its row's largest; an error that has nothing to do
    # with rounding (rows swapped, a scale forgotten) moves scores by several times their spread.
    # Two bits without offsets keep a weight within 1/2 of its row's largest.
    formats = {line.format for line in made.result.plan.lines}
    share = 1.0 if "rowwise_int2" in formats else 0.5
    assert (result - before).abs().max() < share * before.std()


@every_pair
def test_every_table_and_dense_layer_has_one_plan_line(made, step):
    source = made.source
    result = made.result
    assert isinstance(result.plan, Plan)
    named = [line.module for line in result.plan.lines]
    parts = {unit.name for unit in Unit.of(result.module) if unit.part_of is not None}
    assert [name for name in named if name not in parts] == [
        *(unit.name for unit in Unit.of(source.module)),
        "(other)",
    ]
    assert len(named) == len(set(named))
    assert parts <= set(named)
    assert not parts or step.effect == "parts"
    assert all(line.reasons for line in result.plan.lines)


@every_pair
def test_a_plans_bytes_are_those_of_the_stored_tensors(made, step):
    source, result = made.source, made.result
    assert sum(line.bytes_before for line in result.plan.lines) == stored_bytes(
        tensors_of(source.module)[0]
    )
    assert sum(line.bytes_after for line in result.plan.lines) == stored_bytes(mapped(made.folder))
    other = result.plan.of("(other)")
    assert other.bytes_before >= other.bytes_after
    if not isinstance(step, Channels | Fold):  # which narrow norms too, or have none left
        assert other.bytes_before == other.bytes_after


@every_format_pair
def test_every_plan_line_says_what_its_module_holds(made):
    result = made.result
    records = result.network.modules
    stored = mapped(made.folder)
    for line in result.plan.lines:
        if line.module in records:
            assert line.format == records[line.module].format
            inside = {k: v for k, v in stored.items() if k.startswith(f"{line.module}.")}
            assert line.bytes_after == stored_bytes(inside) < line.bytes_before
        elif line.role != "other":
            assert line.format == "float32"
            assert line.bytes_after == line.bytes_before
    assert any(line.module in records for line in result.plan.lines)


@every_values_pair
def test_a_method_of_values_leaves_every_format(made, step, reference):
    source, result = made.source, made.result
    stored = mapped(made.folder)
    assert all(record.kind == "norm" for record in result.network.modules.values())
    assert torch.isfinite(scores(result, reference)).all()
    assert any(step.kind in line.steps for line in result.plan.lines)
    before = source.module.state_dict()
    for line in result.plan.lines[:-1]:
        inside = {k: v for k, v in stored.items() if k.startswith(f"{line.module}.")}
        assert line.format == "float32"
        assert line.bytes_after == stored_bytes(inside) or line.module in {"similar", "friend"}
        if step.kind not in line.steps:
            for name, tensor in inside.items():
                assert torch.equal(tensor, before[name]), name


# Those that take float weights only are left out.
CHANGING_VALUES = [
    m for m in VALUES if m not in (Magnitude, Sparse24, L1Training) and fits(m, RANKER)
]
QUICK = [method for method in CHANGING_VALUES if "training" not in method.model_fields]
TRAINED = [method for method in CHANGING_VALUES if "training" in method.model_fields]


@pytest.mark.parametrize(
    ("method", "packed", "reference"),
    [
        # In the default tier each format has one method of values that does not train, in turn, and
        # each that trains has a format that can hold what it learned, and one that cannot.
        tier(
            method,
            packed,
            reference,
            default=reference is first_reference(method)
            and (
                packed in (RowwiseInt8, BFloat16Dense)
                if method in TRAINED
                else place % len(QUICK) == turn
            ),
        )
        for turn, method in enumerate(QUICK + TRAINED)
        for place, packed in enumerate(FORMATS)
        for reference in references(method)
        if reference in (first_reference(method), RANKER)
    ],
)
def test_values_change_before_and_after_formats(method, packed, reference, tmp_path):
    made = ran(method, reference.network.__name__)
    first, bench = made.result, made.bench
    then = run(packed(), first, bench, tmp_path / "then")
    line = then.plan.of("hidden")
    assert line.steps[0] == method().kind
    assert line.reasons[0].fields["step"] == method().kind
    if method is Channels and "layers" in takes(packed):
        return  # refused, see test_channels.py
    packed_first = ran(packed, reference.network.__name__).result
    if method in (Equalize, SmoothQuant) and "layers" in takes(packed):
        with raises_code(NothingToCompress, "units_missing") as caught:
            run(method(), packed_first, bench, tmp_path / "after")
        already = HasReason("already_stored", format=form(packed()))
        assert already in caught.value.fields["reasons"].values()
        return
    if packed in (Float16, BFloat16Dense) and method is not Channels:
        with raises_code(NothingToCompress, "units_missing") as caught:
            run(models.default(method), packed_first, bench, tmp_path / "after")
        assert HasReason("nothing_to_train") in caught.value.fields["reasons"].values()
        return
    after = run(models.default(method), packed_first, bench, tmp_path / "after")
    assert after.network.modules == packed_first.network.modules
    assert torch.isfinite(scores(after, reference)).all()


@every_pair
def test_the_stored_model_is_the_one_in_memory_bit_for_bit(made, reference, tmp_path):
    result = made.result
    ties = save(result.module, tmp_path / "again")
    assert ties == result.network.ties
    assert records_of(result.module) == result.network.modules
    loaded = load(result.architecture, result.network, tmp_path / "again")
    expected, found = result.module.state_dict(), loaded.state_dict()
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    again = Model(loaded, result.architecture, result.network)
    assert torch.equal(scores(again, reference), scores(result, reference))


@every_pair
def test_the_same_seed_gives_the_same_tensors(made, method, reference, tmp_path):
    run(models.default(method), reference.model(), made.bench, tmp_path / "again")
    first, second = mapped(made.folder), mapped(tmp_path / "again")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@every_format
def test_only_what_was_chosen_changes(method, tmp_path):
    patterns = {"tables": ("h*",), "layers": ("cross",)}
    step = method(**{where: patterns[where] for where in takes(method)})
    source = RANKER.model()
    result = run(step, source, RANKER.bench(tmp_path / "data"), tmp_path / "out")
    wanted = {{"tables": "history", "layers": "cross"}[where] for where in takes(method)}
    assert set(result.network.modules) == wanted
    kept = result.module.state_dict()
    for name, tensor in source.module.state_dict().items():
        if name.partition(".")[0] not in wanted:
            assert torch.equal(kept[name], tensor), name
    for line in result.plan.lines:
        if line.module not in wanted and line.role != "other":
            assert {"not_matched", "wrong_role"} & set(codes_of(line.reasons))


@every_method
def test_step_survives_a_json_round_trip_and_kind_selects_its_class(step):
    text = RECIPES.dump_json(step)
    assert RECIPES.validate_json(text) == step
    assert type(RECIPES.validate_json(text)) is type(step)
    assert RECIPES.validate_python({"kind": step.kind}) == type(step)()
    choices = RECIPES.json_schema()["discriminator"]
    assert choices["propertyName"] == "kind"
    assert step.kind in choices["mapping"]


def test_kinds_are_unique_and_every_method_keeps_one_protocol():
    kinds = [method().kind for method in METHODS]
    assert len(set(kinds)) == len(kinds) >= 4
    for method in METHODS:
        assert isinstance(method(), TableStep | WholeStep)


@every_method
def test_a_step_is_frozen_and_refuses_settings_it_does_not_have(method):
    with pytest.raises(ValidationError, match="frozen"):
        method().kind = "other"
    with pytest.raises(ValidationError, match="Extra inputs"):
        method(strength=1)
    with pytest.raises(ValidationError):
        RECIPES.validate_python({"kind": "no_such_method"})
    assert method() == method()
    assert hash(method()) == hash(method())


@every_method
def test_every_setting_explains_itself_in_a_form(method):
    assert method.__doc__
    for name, field in method.model_fields.items():
        assert name == "kind" or field.description, name


@every_format_pair
def test_nothing_to_compress_on_a_compressed_model(made, step, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(step, made.result, made.bench, tmp_path / "twice")
    already = HasReason("already_stored", format=form(step))
    assert already in caught.value.fields["reasons"].values()


@pytest.mark.parametrize(
    ("method", "where"), [(method, where) for method in METHODS for where in sorted(takes(method))]
)
def test_a_pattern_that_matches_nothing_names_what_there_is(method, where, tmp_path):
    step = method(**{where: ("usre",)})
    with raises_code(NothingToCompress, "name_unmatched", pattern="usre"):
        run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), tmp_path / "out")


@each(m for m in METHODS if "min_rows" in m.model_fields and m not in SEARCHES)
def test_tables_below_min_rows_are_kept_with_that_reason(step, tmp_path):
    bench, step = RANKER.bench(tmp_path / "data"), step.model_copy(update={"min_rows": 40})
    plan = run(step, RANKER.model(), bench, tmp_path / "out").plan
    assert plan.of("city").format == plan.of("tags").format == "float32"
    with_code(plan.of("city").reasons, "too_few_rows", rows=9, min_rows=40)
    assert plan.of("user").format != "float32"


@every_format
def test_tied_tables_are_kept_and_the_reason_names_the_tie(method):
    result = ran(method, "Tied").result
    for name in ("item", "similar"):
        line = result.plan.of(name)
        assert line.format == "float32"
        if "tables" in takes(method):
            other = {"item": "similar", "similar": "item"}[name]
            with_code(line.reasons, "shares_weight", unit=other)
    assert result.module.item.weight is result.module.similar.weight
    assert result.network.ties["similar.weight"] == "item.weight"


@every_format
def test_a_module_in_two_places_is_replaced_in_both(method):
    source, result = ran(method, "Tied").source, ran(method, "Tied").result
    assert result.module.friend is result.module.user
    assert (source.module.friend is result.module.friend) is False
    assert result.plan.of("friend") is None


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@every_format
def test_a_table_that_renormalizes_while_read_is_refused(step, kind, tmp_path):
    source = RANKER.model()
    source.module.user = kind(40, 6, max_norm=1.0)
    with raises_code(StepRefused, "table_renormalizes", table="user"):
        run(step, source, RANKER.bench(tmp_path / "data"), tmp_path / "out")


def in_turn(first: type[Step], second: type[Step]) -> bool:
    return first in WITH_EVERY_FORMAT or second in WITH_EVERY_FORMAT


# Every method before and after every other on one network; two of them on all networks.
COMPOSED = [
    tier(a, b, RANKER, default=in_turn(a, b))
    for a, b in itertools.permutations(FORMATS, 2)
    if not takes(b) <= takes(a)
]
COMPOSED += [
    tier(a, b, reference, default=True)
    for a, b in itertools.permutations(ON_EVERY_REFERENCE, 2)
    for reference in REFERENCES
    if reference is not RANKER
]


@pytest.mark.parametrize(("first", "second", "reference"), COMPOSED)
def test_recipes_compose_in_both_orders(first, second, reference, tmp_path):
    made = ran(first, reference.network.__name__)
    once, twice = made.result, run(second(), made.result, made.bench, tmp_path / "twice")
    assert torch.isfinite(scores(twice, reference)).all()
    assert set(once.network.modules) < set(twice.network.modules)
    for line in once.plan.lines:
        if line.module in once.network.modules:
            assert twice.plan.of(line.module) == line
    assert sum(line.bytes_before for line in twice.plan.lines) == sum(
        line.bytes_before for line in once.plan.lines
    )
    assert sum(line.bytes_after for line in twice.plan.lines) == stored_bytes(
        mapped(tmp_path / "twice")
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        tier(a, b, default=in_turn(a, b))
        for a, b in itertools.permutations(FORMATS, 2)
        if takes(b) <= takes(a)
    ],
)
def test_a_step_finds_nothing_left_by_one_that_takes_the_same(first, second, tmp_path):
    made = ran(first, "Ranker")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(second(), made.result, made.bench, tmp_path / "twice")
    already = HasReason("already_stored", format=form(first()))
    assert already in caught.value.fields["reasons"].values()


@each(method for method in METHODS if isinstance(method(), TableStep))
def test_row_blocks_give_what_one_block_gives(method, tmp_path, monkeypatch):
    made = ran(method, "Ranker")
    # 40 and 300 rows: a short last block
    monkeypatch.setattr("compressors.core.steps.table_encoder.BLOCK_ROWS", 7)
    run(models.default(method), RANKER.model(), made.bench, tmp_path / "blocks")
    whole, blocks = mapped(made.folder), mapped(tmp_path / "blocks")
    torch.testing.assert_close(blocks, whole, rtol=0, atol=0)


# --- single methods under the runner ---------------------------------------------------------


def test_static_int8_needs_calibration_rows(tmp_path):
    bench = Bench(signature=RANKER.signature)
    with raises_code(NothingToCompress, "rows_missing", missing=("calibration",)):
        run(StaticInt8(), RANKER.model(), bench, tmp_path / "out")


def test_layer_with_only_zero_inputs_has_no_scale(tmp_path):
    source = RANKER.model()
    nn.init.zeros_(source.module.hidden.weight)
    nn.init.zeros_(source.module.hidden.bias)
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(StepRefused, "layer_inputs_zero", layer="capped"):
        run(StaticInt8(layers=("capped", "out")), source, bench, tmp_path / "out")
    # The step does not name it, such as a head that only training calls: it stays, and all others
    # are taken.
    for step in (StaticInt8(), Float8Dense(), models.default(QAT)):
        plan = run(step, source, bench, tmp_path / step.kind).plan
        assert plan.of("capped").format == "float32"
        with_code(plan.of("capped").reasons, "zero_inputs")
        assert plan.of("out").format != "float32"


@pytest.mark.parametrize(
    ("step", "weight", "code", "fields"),
    [
        (RowwiseInt8(), 1e8, "scale_beyond_float16", {"quantity": "scale or offset"}),
        (RowwiseInt4(), 1e6, "scale_beyond_float16", {"quantity": "scale or offset"}),
        (RowwiseInt2(), 7e4, "scale_beyond_float16", {"quantity": "offset"}),
        (Float8E4M3(), 1e8, "scale_beyond_float16", {"quantity": "scale"}),
        (BFloat16(), 3.4e38, "weight_beyond_bfloat16", {}),
    ],
)
def test_weights_beyond_the_format_are_refused_with_the_number(
    step, weight, code, fields, tmp_path
):
    wide = replace(RANKER, config={"dim": 16})  # narrow rows are stored in a better format
    source = wide.model()
    with torch.no_grad():
        source.module.item.weight[7, 2] = -weight
    with raises_code(ValueNotStorable, code, **fields) as caught:
        run(step, source, wide.bench(tmp_path / "data"), tmp_path / "out")
    assert caught.value.fields["weight"] == pytest.approx(weight, rel=1e-6)  # of float32


def test_a_layer_without_bias_stays_without_one(tmp_path):
    for step in (Float16(), StaticInt8()):
        folder = tmp_path / step.kind
        result = run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), folder)
        plain = result.module.plain
        assert isinstance(plain, PackedLinear)
        assert not plain.has_bias
        assert not plain.bias.any()
