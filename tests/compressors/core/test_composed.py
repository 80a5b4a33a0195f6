"""The contract of every method that replaces a table by smaller tables ("parts").

Examples are low rank, hashing, and tiers of often and rarely looked-up rows. test_steps.py checks
what holds for every step. ``PARTS`` of ``models.py`` lists these methods. Most tests run them on
its network ``Ranker``. In its network ``Tied``, ``user`` and ``friend`` are one module, and the
tables ``item`` and ``similar`` have one weight.
"""

import functools
import tempfile
from pathlib import Path

import models
import pytest
import torch
from error_codes import raises_code
from model_scores import stored_bytes
from models import PARTS, RANKER, Graph, Reference, lower_reference, only_served_graph
from reason_codes import require_reason
from test_steps import cached_run, method_on_references
from torch import Tensor, nn

from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable, PartSpec, plain_table
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import run
from compressors.core.state.module_state import load, map_tensors
from compressors.core.steps.step import Step, TableStep
from compressors.core.units import Unit, table_rows
from compressors.distill.training.trainable import trainable_tensors
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.factorize.low_rank import LowRank
from compressors.lower.comparison.parity import check_parity
from compressors.lower.export import lower
from compressors.prune.dense.channels import Channels
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

KINDS = [method().kind for method in PARTS]
each_composing_method = pytest.mark.parametrize("method", PARTS, ids=lambda m: m.__name__)
_SCRATCH = tempfile.TemporaryDirectory(prefix="composed-")
# Steps that pack parts (store them in a smaller format), with a scale per row and without scales.
PACKING_STEPS = (RowwiseInt4, Float16)


def list_composed_units(model: models.Model) -> tuple[Unit, ...]:
    """Return the tables that consist of parts."""
    owners = {unit.part_of for unit in Unit.of(model.module)}
    return tuple(unit for unit in Unit.of(model.module) if unit.name in owners)


@method_on_references(PARTS)
def test_each_part_of_a_composed_table_has_a_float32_plan_line(method, reference: Reference):
    step, run_of_method = (
        models.default_step(method),
        cached_run(method, reference.network.__name__),
    )
    source, result = run_of_method.source, run_of_method.result
    composed = list_composed_units(result)
    assert composed
    for unit in composed:
        line = result.plan.of(unit.name)
        assert line.format == unit.format == result.network.modules[unit.name].format
        assert line.steps == (step.kind,)
        parts = [u for u in Unit.of(result.module) if u.part_of == unit.name]
        for part in parts:
            part_line = result.plan.of(part.name)
            assert (part_line.format, part_line.bytes_before, part_line.bytes_after) == (
                "float32",
                0,
                part.bytes,
            )
            require_reason(part_line.reasons, "part_of", unit=unit.name)
        bytes_with_parts = line.bytes_after + sum(part.bytes for part in parts)
        stored = {
            k: v for k, v in map_tensors(run_of_method.folder).items() if k.startswith(unit.name)
        }
        assert bytes_with_parts == stored_bytes(stored)
        # Two tiers save nothing until a later step packs them.
        assert bytes_with_parts < line.bytes_before or method is Tiers
    assert table_rows(result.module).items() >= table_rows(source.module).items()


@each_composing_method
@pytest.mark.parametrize("packing_step", PACKING_STEPS, ids=lambda m: m.__name__)
def test_a_later_step_compresses_the_parts_of_a_composed_table(method, packing_step, tmp_path):
    composed, bench = cached_run(method, "Ranker").result, cached_run(method, "Ranker").bench
    step = models.default_step(packing_step)
    packed = run(step, composed, bench, tmp_path / "packed")
    parts = [unit.name for unit in Unit.of(composed.module) if unit.part_of is not None]
    for name in parts:
        line = packed.plan.of(name)
        assert line.format == step.kind == packed.network.modules[name].format
        assert line.steps == (step.kind,)
        assert line.reasons == (Reason("selected", step=step.kind),)
    for unit in list_composed_units(composed):
        assert packed.plan.of(unit.name) == composed.plan.of(unit.name)
    assert sum(line.bytes_after for line in packed.plan.lines) == stored_bytes(
        map_tensors(tmp_path / "packed")
    )
    assert dry_run(step, composed, bench).plan == packed.plan
    loaded = load(packed.architecture, packed.network, tmp_path / "packed")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(packed.module.state_dict()))


@each_composing_method
def test_the_dry_run_of_a_composing_method_can_be_called_and_pruned(method, tmp_path):
    """A later step runs the network of the dry run, for example to find what it can prune."""
    bench = RANKER.bench(tmp_path / "data")
    predicted = dry_run(models.default_step(method), RANKER.model(), bench)
    inputs = generate_inputs(bench.signature, table_rows(predicted.module), 64)
    assert predicted.module(**inputs).shape == (64, 1)
    assert dry_run(Channels(), predicted, bench).plan is not None


def test_each_part_of_a_part_has_one_plan_line(tmp_path):
    """``Tiers`` makes the parts ``hot`` and ``cold``; ``LowRank`` makes the part ``narrow``."""
    bench, model = RANKER.bench(tmp_path / "data"), RANKER.model()
    for number, step in enumerate((Tiers(), LowRank(tables=("*.cold",)), LowRank(rank=1))):
        predicted = dry_run(step, model, bench).plan
        model = run(step, model, bench, tmp_path / str(number))
        names = [line.module for line in model.plan.lines]
        assert len(set(names)) == len(names)
        bytes_in_file = stored_bytes(map_tensors(tmp_path / str(number)))
        assert sum(line.bytes_after for line in model.plan.lines) == bytes_in_file
        assert sum(line.bytes_after for line in predicted.lines) == bytes_in_file
    require_reason(
        model.plan.of("user.cold.narrow.narrow").reasons, "part_of", unit="user.cold.narrow"
    )


@each_composing_method
def test_a_pattern_that_matches_a_table_also_selects_its_parts(method, tmp_path):
    composed, bench = cached_run(method, "Ranker").result, cached_run(method, "Ranker").bench
    packed = run(RowwiseInt8(tables=("item",)), composed, bench, tmp_path / "packed")
    for unit in Unit.of(packed.module):
        if unit.role == "table" and unit.name not in {u.name for u in list_composed_units(packed)}:
            assert (unit.format == "rowwise_int8") == (unit.part_of == "item"), unit.name


@each_composing_method
def test_a_module_used_under_two_names_is_composed_once(method):
    result = cached_run(method, "Tied").result
    assert isinstance(result.module.user, ComposedTable)
    assert result.module.friend is result.module.user
    require_reason(result.plan.of("item").reasons, "shares_weight", unit="similar")


# Two groups of methods. In each group every method composes another table of one model, so that one
# graph has several compositions.
METHODS_OF_ONE_MODEL = (PARTS[::2], PARTS[1::2])
TABLES = ("user", "item", "history", "tags")  # ids and both kinds of jagged bags


class FourTables(nn.Module):
    """Four of the ranker's tables and one dense layer: it takes less time to export."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(40, dim), nn.Embedding(300, dim + 1)
        self.history = nn.EmbeddingBag(50, dim, mode="sum")
        self.tags = nn.EmbeddingBag(30, dim, mode="max", include_last_offset=True)
        self.out = nn.Linear(4 * dim + 1, 1)

    def forward(
        self,
        user: Tensor,
        item: Tensor,
        history: Tensor,
        history_offsets: Tensor,
        tags: Tensor,
        tags_lengths: Tensor,
    ) -> Tensor:
        edges = torch.cat([tags_lengths.new_zeros(1), tags_lengths.cumsum(0)])  # (rows + 1,)
        bags = self.history(history, history_offsets), self.tags(tags, edges)
        logit: Tensor = self.out(torch.cat([self.user(user), self.item(item), *bags], dim=1))
        return logit


FOUR_TABLES = Reference(
    FourTables,
    RANKER.signature.model_copy(
        update={"inputs": tuple(i for i in RANKER.signature.inputs if i.name in TABLES)}
    ),
)


@functools.cache
def model_with_methods(index: int) -> Model:
    """Apply the methods of one group to ``FOUR_TABLES``, one per table, then int8 to all parts."""
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    model, bench = FOUR_TABLES.model(), FOUR_TABLES.bench(folder / "data")
    for number, (method, table) in enumerate(zip(METHODS_OF_ONE_MODEL[index], TABLES, strict=True)):
        step = models.default_step(method).model_copy(update={"tables": (table,)})
        model = run(step, model, bench, folder / str(number))
        assert model.plan.of(table).steps == (step.kind,)
    return run(RowwiseInt8(), model, bench, folder / "packed")


# The parts of a table are lowered in the same way for every target, so in the default tier (tests
# without the marker ``nightly``) each method has one target.
@pytest.mark.parametrize(
    ("index", "target"),
    [
        pytest.param(index, target, marks=() if index == target_index else pytest.mark.nightly)
        for index in range(len(METHODS_OF_ONE_MODEL))
        for target_index, target in enumerate(("onnxruntime", "tensorrt-rtx"))
    ],
)
def test_a_graph_of_several_composing_methods_has_the_scores_of_its_module(index, target, tmp_path):
    model, path, signature = (
        model_with_methods(index),
        tmp_path / "model.onnx",
        FOUR_TABLES.signature,
    )
    composed = Graph(
        model,
        lower(model.module, only_served_graph(signature), target, path),
        signature,
        path,
    )
    inputs = composed.rows(600)
    check_parity(composed.run_in_torch(inputs), composed.run_in_onnx(inputs), model.plan, target)


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_computes_what_the_module_computes(kind, target):
    composed = lower_reference("Ranker", (kind, "rowwise_int8"), target)
    inputs = composed.rows(600)
    check_parity(
        composed.run_in_torch(inputs), composed.run_in_onnx(inputs), composed.model.plan, target
    )


@each_composing_method
def test_trainable_tensors_exclude_composed_tables_unless_tables_is_true(method):
    result = cached_run(method, "Ranker").result
    inside_composed = tuple(f"{unit.name}." for unit in list_composed_units(result))
    trained_without_tables, trained_with_tables = (
        trainable_tensors(result.module, tables=tables) for tables in (False, True)
    )
    assert not [name for name in trained_without_tables if name.startswith(inside_composed)]
    parts = {unit.name for unit in Unit.of(result.module) if unit.part_of is not None}
    assert {f"{name}.weight" for name in parts} <= set(trained_with_tables)


@each_composing_method
def test_composing_a_packed_table_raises_nothing_to_compress(method, tmp_path):
    packed, bench = (
        cached_run(RowwiseInt8, "Ranker").result,
        cached_run(RowwiseInt8, "Ranker").bench,
    )
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(models.default_step(method), packed, bench, tmp_path / "again")
    assert caught.value.fields["reasons"]["user"] == (
        Reason("already_stored", format="rowwise_int8"),
    )


def test_composing_methods_are_steps_but_not_table_steps():
    for method in PARTS:
        assert isinstance(method(), Step)
        assert not isinstance(method(), TableStep)


def test_reading_the_weight_of_a_composed_table_raises_step_refused():
    result = cached_run(PARTS[0], "Ranker").result
    unit = list_composed_units(result)[0]
    with raises_code(StepRefused, "already_compressed", unit=unit.name, format=unit.format):
        _ = unit.weight


def test_a_part_of_another_shape_raises_a_value_error():
    with pytest.raises(ValueError, match=r"a part of 3 x 2 was given \(2, 3\)"):
        plain_table(PartSpec(3, 2), torch.zeros(2, 3))
