"""The contract of every method that makes tables of smaller ones; test_steps.py checks the rest."""

import functools
import tempfile
from pathlib import Path

import models
import pytest
import torch
from error_codes import raises_code
from model_scores import stored_bytes
from models import PARTS, RANKER, Graph, Reference, graph, whole
from reason_codes import with_code
from test_steps import pairs, ran
from torch import Tensor, nn

from compressors.contracts.reasons import Reason
from compressors.core.batches import example
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable, PartSpec, plain_table
from compressors.core.runner import run
from compressors.core.state.module_state import load, mapped
from compressors.core.steps.step import Step, TableStep
from compressors.core.units import Unit, table_rows
from compressors.distill.training.trainable import trainable
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.factorize.low_rank import LowRank
from compressors.lower.export import lower
from compressors.lower.parity import compare
from compressors.prune.dense.channels import Channels
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

KINDS = [method().kind for method in PARTS]
every_method = pytest.mark.parametrize("method", PARTS, ids=lambda m: m.__name__)
_SCRATCH = tempfile.TemporaryDirectory(prefix="composed-")
PACKERS = (RowwiseInt4, Float16)  # by rows, and by weights


def composed_units(model: models.Model) -> tuple[Unit, ...]:
    """The units that are made of others."""
    owners = {unit.part_of for unit in Unit.of(model.module)}
    return tuple(unit for unit in Unit.of(model.module) if unit.name in owners)


@pairs(PARTS)
def test_parts_are_plain_tables_with_lines_of_their_own(method, reference: Reference):
    step, done = models.default(method), ran(method, reference.network.__name__)
    source, result = done.source, done.result
    made = composed_units(result)
    assert made
    for unit in made:
        line = result.plan.of(unit.name)
        assert line.format == unit.format == result.network.modules[unit.name].format
        assert line.steps == (step.kind,)
        parts = [u for u in Unit.of(result.module) if u.part_of == unit.name]
        for part in parts:
            own = result.plan.of(part.name)
            assert (own.format, own.bytes_before, own.bytes_after) == ("float32", 0, part.bytes)
            with_code(own.reasons, "part_of", unit=unit.name)
        whole = line.bytes_after + sum(part.bytes for part in parts)
        stored = {k: v for k, v in mapped(done.folder).items() if k.startswith(unit.name)}
        assert whole == stored_bytes(stored)
        # Two tiers save nothing until a later step packs them.
        assert whole < line.bytes_before or method is Tiers
    assert table_rows(result.module).items() >= table_rows(source.module).items()


@every_method
@pytest.mark.parametrize("packer", PACKERS, ids=lambda m: m.__name__)
def test_a_later_step_packs_the_parts(method, packer, tmp_path):
    made, bench = ran(method, "Ranker").result, ran(method, "Ranker").bench
    step = models.default(packer)
    packed = run(step, made, bench, tmp_path / "packed")
    parts = [unit.name for unit in Unit.of(made.module) if unit.part_of is not None]
    for name in parts:
        line = packed.plan.of(name)
        assert line.format == step.kind == packed.network.modules[name].format
        assert line.steps == (step.kind,)
        assert line.reasons == (Reason("selected", step=step.kind),)
    for unit in composed_units(made):
        assert packed.plan.of(unit.name) == made.plan.of(unit.name)
    assert sum(line.bytes_after for line in packed.plan.lines) == stored_bytes(
        mapped(tmp_path / "packed")
    )
    assert dry_run(step, made, bench).plan == packed.plan
    again = load(packed.architecture, packed.network, tmp_path / "packed")
    torch.testing.assert_close(dict(again.state_dict()), dict(packed.module.state_dict()))


@every_method
def test_a_predicted_network_runs(method, tmp_path):
    """What is pruned after a table was composed is found by running the network."""
    bench = RANKER.bench(tmp_path / "data")
    predicted = dry_run(models.default(method), RANKER.model(), bench)
    inputs = example(bench.signature, table_rows(predicted.module), 64)
    assert predicted.module(**inputs).shape == (64, 1)
    assert dry_run(Channels(), predicted, bench).plan is not None


def test_tables_in_tables_have_one_line_each(tmp_path):
    bench, model = RANKER.bench(tmp_path / "data"), RANKER.model()
    for number, step in enumerate((Tiers(), LowRank(tables=("*.cold",)), LowRank(rank=1))):
        predicted = dry_run(step, model, bench).plan
        model = run(step, model, bench, tmp_path / str(number))
        names = [line.module for line in model.plan.lines]
        assert len(set(names)) == len(names)
        held = stored_bytes(mapped(tmp_path / str(number)))
        assert sum(line.bytes_after for line in model.plan.lines) == held
        assert sum(line.bytes_after for line in predicted.lines) == held
    with_code(model.plan.of("user.cold.narrow.narrow").reasons, "part_of", unit="user.cold.narrow")


@every_method
def test_a_pattern_means_a_tables_parts_too(method, tmp_path):
    made, bench = ran(method, "Ranker").result, ran(method, "Ranker").bench
    packed = run(RowwiseInt8(tables=("item",)), made, bench, tmp_path / "packed")
    for unit in Unit.of(packed.module):
        if unit.role == "table" and unit.name not in {u.name for u in composed_units(packed)}:
            assert (unit.format == "rowwise_int8") == (unit.part_of == "item"), unit.name


@every_method
def test_a_table_in_two_places_is_made_of_the_same_parts_in_both(method):
    result = ran(method, "Tied").result
    assert isinstance(result.module.user, ComposedTable)
    assert result.module.friend is result.module.user
    with_code(result.plan.of("item").reasons, "shares_weight", unit="similar")


# Each on a table of its own, so that one graph has several of them.
TOGETHER = (PARTS[::2], PARTS[1::2])
TABLES = ("user", "item", "history", "tags")  # ids and both kinds of jagged bags


class FourTables(nn.Module):
    """Four of the ranker's tables and one layer: exported in less time."""

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
def together(place: int) -> Model:
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    model, bench = FOUR_TABLES.model(), FOUR_TABLES.bench(folder / "data")
    for number, (method, table) in enumerate(zip(TOGETHER[place], TABLES, strict=True)):
        step = models.default(method).model_copy(update={"tables": (table,)})
        model = run(step, model, bench, folder / str(number))
        assert model.plan.of(table).steps == (step.kind,)
    return run(RowwiseInt8(), model, bench, folder / "packed")


# A composition is written down by its parts, which are the same for every target; in the default
# tier each method has one target.
@pytest.mark.parametrize(
    ("place", "target"),
    [
        pytest.param(place, target, marks=() if place == turn else pytest.mark.nightly)
        for place in range(len(TOGETHER))
        for turn, target in enumerate(("onnxruntime", "tensorrt-rtx"))
    ],
)
def test_a_graph_of_several_methods_computes_what_the_module_computes(place, target, tmp_path):
    model, path, signature = together(place), tmp_path / "model.onnx", FOUR_TABLES.signature
    made = Graph(model, lower(model.module, whole(signature), target, path), signature, path)
    inputs = made.rows(600)
    compare(made.in_torch(inputs), made.in_onnx(inputs), model.plan, target)


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_computes_what_the_module_computes(kind, target):
    made = graph("Ranker", (kind, "rowwise_int8"), target)
    inputs = made.rows(600)
    compare(made.in_torch(inputs), made.in_onnx(inputs), made.model.plan, target)


@every_method
def test_trainable_excludes_composed_tables_unless_tables_is_true(method):
    result = ran(method, "Ranker").result
    inside = tuple(f"{unit.name}." for unit in composed_units(result))
    still, moving = (trainable(result.module, tables=tables) for tables in (False, True))
    assert not [name for name in still if name.startswith(inside)]
    parts = {unit.name for unit in Unit.of(result.module) if unit.part_of is not None}
    assert {f"{name}.weight" for name in parts} <= set(moving)


@every_method
def test_a_packed_table_is_not_taken_apart(method, tmp_path):
    packed, bench = ran(RowwiseInt8, "Ranker").result, ran(RowwiseInt8, "Ranker").bench
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(models.default(method), packed, bench, tmp_path / "again")
    assert caught.value.fields["reasons"]["user"] == (
        Reason("already_stored", format="rowwise_int8"),
    )


def test_both_protocols_are_not_kept_at_once():
    for method in PARTS:
        assert isinstance(method(), Step)
        assert not isinstance(method(), TableStep)


def test_a_composed_tables_own_weight_is_not_there_to_take():
    result = ran(PARTS[0], "Ranker").result
    unit = composed_units(result)[0]
    with raises_code(StepRefused, "already_compressed", unit=unit.name, format=unit.format):
        _ = unit.weight


def test_a_part_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"a part of 3 x 2 was given \(2, 3\)"):
        plain_table(PartSpec(3, 2), torch.zeros(2, 3))
