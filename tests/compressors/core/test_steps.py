"""The contract of every step in ``compressors.core.registries``, checked on reference networks.

Each method runs once per reference network (``cached_run``) and many tests check the result. The
end of the file has tests of single methods that need the runner ``run``, which plans and applies a
step, checks the result and stores it.

``models`` lists the methods. ``ALONE`` are those that change an uncompressed network; ``NOT_ALONE``
are the others. By what they change, ``FORMATS`` store units in another format, and ``VALUES``
change values and keep the format. ``SEARCHES`` choose the units that they change by values and
data, so the setting ``min_rows`` does not decide alone. ``result.network`` describes how the model
is stored: ``modules`` has a record for each module that differs from how its class creates it (the
kind "norm" is a folded norm), and ``ties`` the names of tensors that are stored under another name.

The networks are also in ``models``. ``RANKER`` has the tables ``user`` (40 rows), ``item`` (300)
and ``city`` (9) and the bags ``genres``, ``history`` and ``tags``. Its dense layers are ``cross``,
``hidden``, ``capped``, ``plain`` (without bias) and ``out``. In ``Tied``, the tables ``item`` and
``similar`` have one weight, and ``user`` and ``friend`` are one module.
"""

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
    copy_state,
)
from pydantic import TypeAdapter, ValidationError
from reason_codes import codes_of, require_reason
from torch import Tensor, nn

from compressors.contracts import Bench, Plan
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.core.state.module_state import build_records, load, map_tensors, save, tensors_of
from compressors.core.steps.step import Step as StepProtocol
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
from compressors.quantize.tables.table_qat import TableQAT
from compressors.rewrite.equalize import Equalize
from compressors.rewrite.fold import Fold
from compressors.rewrite.smooth_quant import SmoothQuant

ANY_STEP = TypeAdapter(AnyStep)
"""Reads a step of any kind from JSON."""


def unit_settings(method: type[Step]) -> set[str]:
    """Return the settings of a method that select units: ``tables``, ``layers`` or both."""
    return {"tables", "layers"} & set(method.model_fields)


# Their scores are not close: the few codes of a row represent random rows badly.
# quantize/test_table_codes.py tests their error.
CODEBOOK_METHODS = {ProductCodes, ResidualCodes, AdditiveCodes}
# Formats whose scores stay close. Training in QAT moves scores to the labels; see
# quantize/test_qat.py and test_table_qat.py.
CLOSE_FORMATS = tuple(
    method for method in FORMATS if method not in (*CODEBOOK_METHODS, QAT, TableQAT)
)


# References with a constructor argument that sets only the width of a layer, so that ``Channels``
# can change it. In the others, the argument also sets the dimension of a table.
WITH_WIDTHS = (RANKER, NORMED)


# By kind of step, the format that it writes, if the kind is not the name of the format.
STORED_FORMAT = {
    "qat": "static_int8",
    "bfloat16_dense": "bfloat16",
    "table_qat": "rowwise_int4",
}


def format_of(step: Step) -> str:
    """Return the format that a step writes; additive codes are stored as residual codes."""
    return (
        step.storage.name if hasattr(step, "storage") else STORED_FORMAT.get(step.kind, step.kind)
    )


# The references of each method that has something to compress on only some of them.
REFERENCES_OF: dict[type[Step], tuple[Reference, ...]] = {
    Channels: WITH_WIDTHS,
    Fold: (NORMED,),
    # These two steps export the network, which takes three times as long for RANKER.
    Equalize: (COMPACT, RANKER),
    SmoothQuant: (COMPACT, RANKER, NORMED),
    LowRankDense: (RANKER, ATTENTION, NORMED),
}


def applies_to(method: type[Step], reference: Reference) -> bool:
    return reference in references(method)


# Methods that run on every reference in the default tier: one for tables, one for layers.
ON_EVERY_REFERENCE = (RowwiseInt4, StaticInt8)
# Formats that run before and after every other format in the default tier.
WITH_EVERY_FORMAT = (RowwiseInt8, StaticInt8, Float16)


def references(method: type[Step]) -> tuple[Reference, ...]:
    """Return the references on which a method has something to compress."""
    return REFERENCES_OF.get(method, REFERENCES)


def default_reference(method: type[Step]) -> Reference:
    """Return the one reference on which a method runs in the default tier."""
    return references(method)[0]


def case(*values: object, default: bool) -> typing.Any:
    """Build one parametrized case of a test, in the default or in the nightly tier.

    A case in the nightly tier has the marker ``nightly``, which an ordinary run of pytest excludes.
    """
    names = (getattr(value, "__name__", None) or value.network.__name__ for value in values)
    return pytest.param(*values, id="-".join(names), marks=() if default else pytest.mark.nightly)


def method_on_references(methods: tuple[type[Step], ...]) -> pytest.MarkDecorator:
    """Parametrize a test with each method on each reference on which it can compress something.

    In the default tier each method runs on one reference, and ``ON_EVERY_REFERENCE`` on all.
    """
    cases = [
        case(m, r, default=r is default_reference(m) or m in ON_EVERY_REFERENCE)
        for m in methods
        for r in references(m)
    ]
    return pytest.mark.parametrize(("method", "reference"), cases)


def each_of(methods: typing.Iterable[type[Step]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.__name__)


each_method = each_of(METHODS)
each_format = each_of(FORMATS)
each_method_on_references = method_on_references(ALONE)
each_format_on_references = method_on_references(FORMATS)
each_values_method_on_references = method_on_references(VALUES)


@pytest.fixture
def step(method) -> Step:
    return models.default_step(method)


@pytest.fixture
def bench(reference, tmp_path) -> Bench:
    return reference.bench(tmp_path / "data")


def tensor_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return address and version counter of each tensor; torch increases the counter at a write."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (tensor.data_ptr(), tensor._version) for name, tensor in tensors}


def scores(model: Model, reference: Reference, rows: int = 9) -> Tensor:
    inputs = models.generate_inputs(reference.signature, reference.rows_of_tables(), rows, seed=3)
    with torch.no_grad():
        return model.module(**inputs)


_SCRATCH = tempfile.TemporaryDirectory(prefix="steps-")


@dataclass(frozen=True)
class CachedRun:
    """The result of a method on a reference with default settings.

    ``before`` is the ``state_of`` the source model before the step, and ``tensors`` a copy of the
    source's tensors at that time.
    """

    source: Model
    before: tuple[object, ...]
    tensors: dict[str, Tensor]
    result: Model
    folder: Path
    bench: Bench


@functools.cache
def cached_run(method: type[Step], name: str) -> CachedRun:
    """Run a method on a reference once and return the result, which many tests check."""
    reference = BY_NAME[name]
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    source = reference.model()
    source.module.train()
    before, tensors = state_of(source), copy_state(source.module)
    bench = reference.bench(folder / "data")
    result = run(models.default_step(method), source, bench, folder / "out")
    return CachedRun(source, before, tensors, result, folder / "out", bench)


def state_of(model: Model) -> tuple[object, ...]:
    """Return what a step must not change: tensor versions, modules and their training modes."""
    modules = model.module.named_modules()
    return tensor_versions(model.module), [
        (name, id(module), module.training) for name, module in modules
    ]


@pytest.fixture
def method_run(method, reference) -> CachedRun:
    return cached_run(method, reference.network.__name__)


def test_every_method_and_every_reference_is_in_the_default_tier():
    all_cases = each_method_on_references.args[1]
    default = [parameters.values for parameters in all_cases if not parameters.marks]
    assert {method for method, _ in default} == set(ALONE) == set(METHODS) - set(NOT_ALONE)
    assert {reference.network for _, reference in default} == {r.network for r in BY_NAME.values()}
    pairs = [parameters.values[:2] for parameters in PAIRS_OF_FORMATS if not parameters.marks]
    assert {method for pair in pairs for method in pair} == set(FORMATS)


# --- the contract of every step --------------------------------------------------------------


@each_method_on_references
def test_a_step_does_not_change_its_source_model(method_run):
    assert state_of(method_run.source) == method_run.before
    torch.testing.assert_close(
        copy_state(method_run.source.module), method_run.tensors, rtol=0, atol=0
    )


@method_on_references(CLOSE_FORMATS)
def test_scores_of_compressed_models_are_finite_and_close_to_the_scores_of_the_source(
    method_run, reference
):
    result = scores(method_run.result, reference)
    before = scores(reference.model(), reference)
    assert torch.isfinite(result).all()
    assert result.shape == before.shape
    # The rounding error is at most 1/14 of the largest weight of a row with four bits, and 1/2 with
    # two bits without offsets. Other errors (rows swapped, a missing scale) change scores by
    # several times their spread.
    formats = {line.format for line in method_run.result.plan.lines}
    factor = 1.0 if "rowwise_int2" in formats else 0.5
    assert (result - before).abs().max() < factor * before.std()


@each_method_on_references
def test_every_table_and_dense_layer_has_one_plan_line(method_run, step):
    """The line ``(other)`` has the tensors of no table or dense layer.

    Only steps with the effect ``parts`` replace a table by several smaller ones.
    """
    source = method_run.source
    result = method_run.result
    assert isinstance(result.plan, Plan)
    names = [line.module for line in result.plan.lines]
    parts = {unit.name for unit in Unit.of(result.module) if unit.part_of is not None}
    assert [name for name in names if name not in parts] == [
        *(unit.name for unit in Unit.of(source.module)),
        "(other)",
    ]
    assert len(names) == len(set(names))
    assert parts <= set(names)
    assert not parts or step.effect == "parts"
    assert all(line.reasons for line in result.plan.lines)


@each_method_on_references
def test_bytes_in_the_plan_equal_the_bytes_of_the_stored_tensors(method_run, step):
    source, result = method_run.source, method_run.result
    assert sum(line.bytes_before for line in result.plan.lines) == stored_bytes(
        tensors_of(source.module)[0]
    )
    assert sum(line.bytes_after for line in result.plan.lines) == stored_bytes(
        map_tensors(method_run.folder)
    )
    other = result.plan.of("(other)")
    assert other.bytes_before >= other.bytes_after
    if not isinstance(step, Channels | Fold):  # these also remove channels of norms, or norms
        assert other.bytes_before == other.bytes_after


@each_format_on_references
def test_format_and_bytes_of_each_plan_line_equal_format_and_bytes_of_its_module(method_run):
    result = method_run.result
    records = result.network.modules
    stored = map_tensors(method_run.folder)
    for line in result.plan.lines:
        if line.module in records:
            assert line.format == records[line.module].format
            inside = {k: v for k, v in stored.items() if k.startswith(f"{line.module}.")}
            assert line.bytes_after == stored_bytes(inside) < line.bytes_before
        elif line.role != "other":
            assert line.format == "float32"
            assert line.bytes_after == line.bytes_before
    assert any(line.module in records for line in result.plan.lines)


@each_values_method_on_references
def test_a_method_that_changes_values_keeps_all_formats(method_run, step, reference):
    source, result = method_run.source, method_run.result
    stored = map_tensors(method_run.folder)
    assert all(record.kind == "norm" for record in result.network.modules.values())
    assert torch.isfinite(scores(result, reference)).all()
    assert any(step.kind in line.steps for line in result.plan.lines)
    before = source.module.state_dict()
    for line in result.plan.lines[:-1]:
        inside = {k: v for k, v in stored.items() if k.startswith(f"{line.module}.")}
        assert line.format == "float32"
        # ``similar`` and ``friend`` share the tensors of other modules, which are stored once.
        assert line.bytes_after == stored_bytes(inside) or line.module in {"similar", "friend"}
        if step.kind not in line.steps:
            for name, tensor in inside.items():
                assert torch.equal(tensor, before[name]), name


# Methods for dense layers that change only weights of float layers are excluded.
CHANGING_VALUES = [
    m for m in VALUES if m not in (Magnitude, Sparse24, L1Training) and applies_to(m, RANKER)
]
WITHOUT_TRAINING = [method for method in CHANGING_VALUES if "training" not in method.model_fields]
WITH_TRAINING = [method for method in CHANGING_VALUES if "training" in method.model_fields]


@pytest.mark.parametrize(
    ("method", "format_class", "reference"),
    [
        # In the default tier each format runs with one method without training; the methods take
        # turns. Each method with training runs with two formats: RowwiseInt8 compresses only tables
        # and leaves layers to train, BFloat16Dense leaves none.
        case(
            method,
            format_class,
            reference,
            default=reference is default_reference(method)
            and (
                format_class in (RowwiseInt8, BFloat16Dense)
                if method in WITH_TRAINING
                else format_index % len(WITHOUT_TRAINING) == method_index
            ),
        )
        for method_index, method in enumerate(WITHOUT_TRAINING + WITH_TRAINING)
        for format_index, format_class in enumerate(FORMATS)
        for reference in references(method)
        if reference in (default_reference(method), RANKER)
    ],
)
def test_methods_that_change_values_run_before_and_after_formats(
    method, format_class, reference, tmp_path
):
    method_run = cached_run(method, reference.network.__name__)
    first, bench = method_run.result, method_run.bench
    packed_after = run(format_class(), first, bench, tmp_path / "then")
    line = packed_after.plan.of("hidden")
    assert line.steps[0] == method().kind
    assert line.reasons[0].fields["step"] == method().kind
    if method is Channels and "layers" in unit_settings(format_class):
        return  # ``Channels`` refuses compressed layers; see prune/test_channels.py
    packed_first = cached_run(format_class, reference.network.__name__).result
    if method in (Equalize, SmoothQuant) and "layers" in unit_settings(format_class):
        with raises_code(NothingToCompress, "units_missing") as caught:
            run(method(), packed_first, bench, tmp_path / "after")
        expected_reason = HasReason("already_stored", format=format_of(format_class()))
        assert expected_reason in caught.value.fields["reasons"].values()
        return
    if format_class in (Float16, BFloat16Dense) and method is not Channels:
        with raises_code(NothingToCompress, "units_missing") as caught:
            run(models.default_step(method), packed_first, bench, tmp_path / "after")
        assert HasReason("nothing_to_train") in caught.value.fields["reasons"].values()
        return
    after = run(models.default_step(method), packed_first, bench, tmp_path / "after")
    assert after.network.modules == packed_first.network.modules
    assert torch.isfinite(scores(after, reference)).all()


@each_method_on_references
def test_the_loaded_model_has_the_tensors_and_scores_of_the_result(method_run, reference, tmp_path):
    result = method_run.result
    ties = save(result.module, tmp_path / "again")
    assert ties == result.network.ties
    assert build_records(result.module) == result.network.modules
    loaded = load(result.architecture, result.network, tmp_path / "again")
    expected, actual = result.module.state_dict(), loaded.state_dict()
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in expected.items()}
    loaded_model = Model(loaded, result.architecture, result.network)
    assert torch.equal(scores(loaded_model, reference), scores(result, reference))


@each_method_on_references
def test_two_runs_of_a_step_give_equal_tensors(method_run, method, reference, tmp_path):
    run(models.default_step(method), reference.model(), method_run.bench, tmp_path / "again")
    first, second = map_tensors(method_run.folder), map_tensors(tmp_path / "again")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@each_format
def test_only_units_that_match_the_patterns_change(method, tmp_path):
    patterns = {"tables": ("h*",), "layers": ("cross",)}
    step = method(**{setting: patterns[setting] for setting in unit_settings(method)})
    source = RANKER.model()
    result = run(step, source, RANKER.bench(tmp_path / "data"), tmp_path / "out")
    expected = {
        {"tables": "history", "layers": "cross"}[setting] for setting in unit_settings(method)
    }
    assert set(result.network.modules) == expected
    result_state = result.module.state_dict()
    for name, tensor in source.module.state_dict().items():
        if name.partition(".")[0] not in expected:
            assert torch.equal(result_state[name], tensor), name
    for line in result.plan.lines:
        if line.module not in expected and line.role != "other":
            assert {"not_matched", "wrong_role"} & set(codes_of(line.reasons))


@each_method
def test_step_survives_a_json_round_trip_and_kind_selects_its_class(step):
    text = ANY_STEP.dump_json(step)
    assert ANY_STEP.validate_json(text) == step
    assert type(ANY_STEP.validate_json(text)) is type(step)
    assert ANY_STEP.validate_python({"kind": step.kind}) == type(step)()
    choices = ANY_STEP.json_schema()["discriminator"]
    assert choices["propertyName"] == "kind"
    assert step.kind in choices["mapping"]


def test_kinds_are_unique_and_every_method_implements_a_step_protocol():
    kinds = [method().kind for method in METHODS]
    assert len(set(kinds)) == len(kinds) >= 4  # the list of methods is not empty
    for method in METHODS:
        assert isinstance(method(), TableStep | StepProtocol)


@each_method
def test_a_step_is_frozen_hashable_and_rejects_unknown_settings(method):
    with pytest.raises(ValidationError, match="frozen"):
        method().kind = "other"
    with pytest.raises(ValidationError, match="Extra inputs"):
        method(strength=1)
    with pytest.raises(ValidationError):
        ANY_STEP.validate_python({"kind": "no_such_method"})
    assert method() == method()
    assert hash(method()) == hash(method())


@each_method
def test_every_method_and_setting_has_a_description(method):
    assert method.__doc__
    for name, field in method.model_fields.items():
        assert name == "kind" or field.description, name


@each_format_on_references
def test_the_same_step_again_raises_nothing_to_compress(method_run, step, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(step, method_run.result, method_run.bench, tmp_path / "twice")
    expected_reason = HasReason("already_stored", format=format_of(step))
    assert expected_reason in caught.value.fields["reasons"].values()


@pytest.mark.parametrize(
    ("method", "setting"),
    [(method, setting) for method in METHODS for setting in sorted(unit_settings(method))],
)
def test_a_pattern_that_matches_no_unit_raises_name_unmatched(method, setting, tmp_path):
    step = method(**{setting: ("usre",)})
    with raises_code(NothingToCompress, "name_unmatched", pattern="usre"):
        run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), tmp_path / "out")


@each_of(m for m in METHODS if "min_rows" in m.model_fields and m not in SEARCHES)
def test_tables_below_min_rows_are_kept_with_a_reason(step, tmp_path):
    bench, step = RANKER.bench(tmp_path / "data"), step.model_copy(update={"min_rows": 40})
    plan = run(step, RANKER.model(), bench, tmp_path / "out").plan
    assert plan.of("city").format == plan.of("tags").format == "float32"
    require_reason(plan.of("city").reasons, "too_few_rows", rows=9, min_rows=40)
    assert plan.of("user").format != "float32"


@each_format
def test_tables_that_share_a_weight_are_kept_and_the_reason_names_the_other_table(method):
    result = cached_run(method, "Tied").result
    for name in ("item", "similar"):
        line = result.plan.of(name)
        assert line.format == "float32"
        if "tables" in unit_settings(method):
            other = {"item": "similar", "similar": "item"}[name]
            require_reason(line.reasons, "shares_weight", unit=other)
    assert result.module.item.weight is result.module.similar.weight
    assert result.network.ties["similar.weight"] == "item.weight"


@each_format
def test_a_module_used_under_two_names_is_replaced_under_both(method):
    source, result = cached_run(method, "Tied").source, cached_run(method, "Tied").result
    assert result.module.friend is result.module.user
    assert (source.module.friend is result.module.friend) is False
    assert result.plan.of("friend") is None


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@each_format
def test_a_table_with_max_norm_raises_step_refused(step, kind, tmp_path):
    source = RANKER.model()
    source.module.user = kind(40, 6, max_norm=1.0)
    with raises_code(StepRefused, "table_renormalizes", table="user"):
        run(step, source, RANKER.bench(tmp_path / "data"), tmp_path / "out")


def is_in_default_tier(first: type[Step], second: type[Step]) -> bool:
    return first in WITH_EVERY_FORMAT or second in WITH_EVERY_FORMAT


# Each format before and after each other format on one network; two of them on all networks.
PAIRS_OF_FORMATS = [
    case(a, b, RANKER, default=is_in_default_tier(a, b))
    for a, b in itertools.permutations(FORMATS, 2)
    if not unit_settings(b) <= unit_settings(a)
]
PAIRS_OF_FORMATS += [
    case(a, b, reference, default=True)
    for a, b in itertools.permutations(ON_EVERY_REFERENCE, 2)
    for reference in REFERENCES
    if reference is not RANKER
]


@pytest.mark.parametrize(("first", "second", "reference"), PAIRS_OF_FORMATS)
def test_two_formats_for_different_units_run_in_both_orders(first, second, reference, tmp_path):
    method_run = cached_run(first, reference.network.__name__)
    once, twice = (
        method_run.result,
        run(second(), method_run.result, method_run.bench, tmp_path / "twice"),
    )
    assert torch.isfinite(scores(twice, reference)).all()
    assert set(once.network.modules) < set(twice.network.modules)
    for line in once.plan.lines:
        if line.module in once.network.modules:
            assert twice.plan.of(line.module) == line
    assert sum(line.bytes_before for line in twice.plan.lines) == sum(
        line.bytes_before for line in once.plan.lines
    )
    assert sum(line.bytes_after for line in twice.plan.lines) == stored_bytes(
        map_tensors(tmp_path / "twice")
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        case(a, b, default=is_in_default_tier(a, b))
        for a, b in itertools.permutations(FORMATS, 2)
        if unit_settings(b) <= unit_settings(a)
    ],
)
def test_a_second_format_for_the_same_units_raises_nothing_to_compress(first, second, tmp_path):
    method_run = cached_run(first, "Ranker")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(second(), method_run.result, method_run.bench, tmp_path / "twice")
    expected_reason = HasReason("already_stored", format=format_of(first()))
    assert expected_reason in caught.value.fields["reasons"].values()


@each_of(method for method in METHODS if isinstance(method(), TableStep))
def test_tables_encoded_in_row_blocks_equal_tables_encoded_at_once(method, tmp_path, monkeypatch):
    method_run = cached_run(method, "Ranker")
    # The tables have 40 and 300 rows, so the last block has fewer than 7.
    monkeypatch.setattr("compressors.core.steps.table_encoder.BLOCK_ROWS", 7)
    run(models.default_step(method), RANKER.model(), method_run.bench, tmp_path / "blocks")
    at_once, blocks = map_tensors(method_run.folder), map_tensors(tmp_path / "blocks")
    torch.testing.assert_close(blocks, at_once, rtol=0, atol=0)


# --- single methods under the runner ---------------------------------------------------------


def test_static_int8_without_calibration_rows_raises_nothing_to_compress(tmp_path):
    bench = Bench(signature=RANKER.signature)
    with raises_code(NothingToCompress, "rows_missing", missing=("calibration",)):
        run(StaticInt8(), RANKER.model(), bench, tmp_path / "out")


def test_a_layer_with_only_zero_inputs_is_skipped_and_an_error_if_named(tmp_path):
    source = RANKER.model()
    nn.init.zeros_(source.module.hidden.weight)  # the layer ``capped`` reads its output
    nn.init.zeros_(source.module.hidden.bias)
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(StepRefused, "layer_inputs_zero", layer="capped"):
        run(StaticInt8(layers=("capped", "out")), source, bench, tmp_path / "out")
    # Steps that do not name the layer skip it (it may be a head that only training calls).
    for step in (StaticInt8(), Float8Dense(), models.default_step(QAT)):
        plan = run(step, source, bench, tmp_path / step.kind).plan
        assert plan.of("capped").format == "float32"
        require_reason(plan.of("capped").reasons, "zero_inputs")
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
def test_weights_beyond_the_range_of_a_format_raise_value_not_storable(
    step, weight, code, fields, tmp_path
):
    # With the default width of 7, int2 would store the table in int4, which takes no more bytes.
    wide = replace(RANKER, config={"dim": 16})
    source = wide.model()
    with torch.no_grad():
        source.module.item.weight[7, 2] = -weight
    with raises_code(ValueNotStorable, code, **fields) as caught:
        run(step, source, wide.bench(tmp_path / "data"), tmp_path / "out")
    assert caught.value.fields["weight"] == pytest.approx(weight, rel=1e-6)  # of float32


def test_a_packed_layer_without_bias_has_no_bias(tmp_path):
    for step in (Float16(), StaticInt8()):
        folder = tmp_path / step.kind
        result = run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), folder)
        packed_layer = result.module.plain
        assert isinstance(packed_layer, PackedLinear)
        assert not packed_layer.has_bias
        assert not packed_layer.bias.any()
