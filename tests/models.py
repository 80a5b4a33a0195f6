"""Small reference networks that most tests use, benches of random rows, and lists of methods.

The networks have every kind of table, bag and dense layer. Each is a ``Reference``: the class, its
arguments, and its signature. The weights are random, from a seed. The end of the file exports
graphs of compressed references and caches them.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from multi_task_network import MultiTaskNet
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import (
    Architecture,
    Bench,
    DenseInput,
    IdInput,
    JaggedBag,
    Network,
    Output,
    PaddedBag,
    Signature,
    Split,
    TargetName,
)
from compressors.core.batches import batches, model_inputs
from compressors.core.model import Model
from compressors.core.modules.pointwise import replace_pointwise_convs
from compressors.core.random_inputs import generate_data, generate_inputs
from compressors.core.registries import METHODS as REGISTRY
from compressors.core.runner import rows_of_tables, run
from compressors.core.scores import join_columns, network_scores, score_columns
from compressors.core.steps.decisions import AppliedStep
from compressors.core.steps.step import Method as Step
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.recalibrate import Recalibrate
from compressors.distill.refit_codes import RefitCodes
from compressors.distill.training.settings import Training
from compressors.factorize.low_rank_dense import LowRankDense
from compressors.lower.export import Lowered, lower
from compressors.lower.passes.bfloat16_matmuls import has_bfloat16_matmuls, write_checkable
from compressors.lower.serving_wrapper import ServedGraph, input_names, served_graphs
from compressors.prune.dense.drop_layers import DropLayers
from compressors.prune.dense.l1_training import L1Training
from compressors.prune.dense.magnitude import Magnitude
from compressors.prune.dense.sparse_2_4 import Sparse24
from compressors.prune.tables.drop_tables import DropTables
from compressors.prune.tables.merge_rows import MergeRows
from compressors.rewrite.fold import Fold
from infra.onnxruntime.sessions import Session

torch.set_num_threads(1)

METHODS: tuple[Any, ...] = tuple(REGISTRY.values())
# Methods that need a compressed model, labels that agree with its predictions, or an argument for
# the number of layers. All other methods change every reference that they support.
NOT_ALONE = (RefitCodes, Recalibrate, DropLayers)
ALONE = tuple(method for method in METHODS if method not in NOT_ALONE)


# Methods by effect: they change values within a format, store units in another format, or replace
# a table by smaller tables ("parts").
def _with_effect(effect: str) -> tuple[type[Step], ...]:
    return tuple(method for method in ALONE if method.effect == effect)


VALUES, FORMATS, PARTS = _with_effect("values"), _with_effect("format"), _with_effect("parts")
# The size of their result depends on values and data, so they are tested separately.
SEARCHES = (DropTables, MergeRows)
# LowRankDense replaces dense layers, not tables.
PARTS = tuple(method for method in PARTS if method not in (*SEARCHES, LowRankDense))
# Methods that keep each table as one table; core/test_composed.py tests the others.
UNDIVIDED = (*VALUES, *FORMATS)
# Without methods that change only values of weights, whose graphs are those of the uncompressed
# network, and without Fold, since the ranker has neither norms nor dead (constant) channels.
ONLY_WEIGHT_VALUES = (Magnitude, Sparse24, L1Training, Distill, FineTune)
UNDIVIDED = tuple(method for method in UNDIVIDED if method not in (Fold, *ONLY_WEIGHT_VALUES))


def _kinds_for(units: set[str]) -> list[str]:
    """Return the kinds in ``UNDIVIDED`` that apply to ``tables``, to ``layers`` or to both."""
    return [
        method.model_fields["kind"].default
        for method in UNDIVIDED
        if {"tables", "layers"} & set(method.model_fields) == units
    ]


# Recipes of one or two kinds. An export takes three seconds, so a method for layers and one for
# tables share a graph. The scores of graph and module may differ more if layers are quantized, so
# lower/test_table_forms.py and lower/test_table_code_graphs.py check quantized tables with float32
# layers.
RECIPES: tuple[tuple[str, ...], ...] = (
    *(
        tuple(kind for kind in pair if kind is not None)
        for pair in itertools.zip_longest(_kinds_for({"layers"}), _kinds_for({"tables"}))
    ),
    *((kind,) for kind in _kinds_for({"layers", "tables"})),
)


def build_recipe(kind: str) -> tuple[str, ...]:
    """Return the recipe in ``RECIPES`` that contains a kind of step."""
    (recipe,) = (recipe for recipe in RECIPES if kind in recipe)
    return recipe


# A short training that changes weights noticeably with 96 rows.
SHORT_TRAINING = Training(batch=16, learning_rate=0.02, warmup=0)
BENCH_ROWS = 96
LONGEST = 5


class Ranker(nn.Module):
    """Ids, three kinds of bags and a dense vector; a cross layer parallel to a perceptron.

    ``cross`` and ``hidden`` read the same vector. A relu follows ``hidden`` and a relu6 follows
    ``capped``. ``plain`` has no bias, and ``item`` has an odd width.
    """

    def __init__(self, dim: int = 6, width: int = 16) -> None:
        super().__init__()
        self.user = nn.Embedding(40, dim)
        self.item = nn.Embedding(300, dim + 1)
        self.city = nn.Embedding(9, dim)
        self.genres = nn.EmbeddingBag(20, dim, mode="mean", padding_idx=0)
        self.history = nn.EmbeddingBag(50, dim, mode="sum")
        self.tags = nn.EmbeddingBag(30, dim, mode="max", include_last_offset=True)
        total = 6 * dim + 1 + 3
        self.cross = nn.Linear(total, total)
        self.hidden = nn.Linear(total, width)
        self.capped = nn.Linear(width, width)
        self.plain = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(total + width, 1)

    def forward(
        self,
        user: Tensor,
        item: Tensor,
        city: Tensor,
        genres: Tensor,
        history: Tensor,
        history_offsets: Tensor,
        tags: Tensor,
        tags_lengths: Tensor,
        price: Tensor,
    ) -> Tensor:
        edges = torch.cat([tags_lengths.new_zeros(1), tags_lengths.cumsum(0)])  # (rows + 1,)
        parts = (
            self.user(user),
            self.item(item),
            self.city(city),
            self.genres(genres),
            self.history(history, history_offsets),
            self.tags(tags, edges),
            price,
        )
        x = torch.cat(parts, dim=1)  # (rows, total)
        crossed = x * self.cross(x) + x
        deep = F.relu(self.hidden(x))
        deep = self.plain(F.relu6(self.capped(deep)))
        logit: Tensor = self.out(torch.cat([crossed, deep], dim=1))  # (rows, 1)
        return logit


class Compact(nn.Module):
    """The dense layers of ``Ranker`` with two tables only, which takes a third of the export time.

    ``genres`` is looked up for two ids. ``item`` has an odd width.
    """

    def __init__(self, dim: int = 6, width: int = 16) -> None:
        super().__init__()
        self.item = nn.Embedding(300, dim + 1)
        self.genres = nn.Embedding(40, dim)
        total = 3 * dim + 1 + 3
        self.cross = nn.Linear(total, total)
        self.hidden = nn.Linear(total, width)
        self.capped = nn.Linear(width, width)
        self.plain = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(total + width, 1)

    def forward(self, item: Tensor, genres: Tensor, price: Tensor) -> Tensor:
        parts = (self.item(item), self.genres(genres).flatten(1), price)
        x = torch.cat(parts, dim=1)  # (rows, total)
        crossed = x * self.cross(x) + x
        deep = F.relu(self.hidden(x))
        deep = self.plain(F.relu6(self.capped(deep)))
        logit: Tensor = self.out(torch.cat([crossed, deep], dim=1))  # (rows, 1)
        return logit


class Tied(nn.Module):
    """Two tables that share one weight, and one module under two names."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.item = nn.Embedding(30, dim)
        self.similar = nn.Embedding(30, dim)
        self.similar.weight = self.item.weight
        self.user = nn.Embedding(20, dim)
        self.friend = self.user
        self.out = nn.Linear(4 * dim, 1)

    def forward(self, item: Tensor, similar: Tensor, user: Tensor, friend: Tensor) -> Tensor:
        parts = (self.item(item), self.similar(similar), self.user(user), self.friend(friend))
        score: Tensor = self.out(torch.cat(parts, dim=1)).squeeze(1)
        return score


class Buffered(nn.Module):
    """Has a non-persistent buffer, a persistent one, and a plain tensor attribute.

    ``places`` has the row numbers of the table of positions, all of which every call reads.
    """

    places: Tensor
    gain: Tensor

    def __init__(self, dim: int = 4, fields: int = 3) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(fields), persistent=False)
        self.register_buffer("gain", torch.full((fields * dim,), 0.5))
        self.floor = torch.full((1,), -1.0)
        self.fields = nn.Embedding(30, dim)
        self.position = nn.Embedding(fields, dim)
        self.out = nn.Linear(fields * dim, 1)

    def forward(self, fields: Tensor) -> Tensor:
        rows = self.fields(fields) + self.position(self.places)  # (rows, fields, dim)
        x = torch.maximum(rows.flatten(1) * self.gain, self.floor)
        score: Tensor = self.out(x).squeeze(1)
        return score


class Attention(nn.Module):
    """Attention of a user over a padded history, with dense layers over ``(rows, length, dim)``."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.user = nn.Embedding(25, dim)
        self.item = nn.Embedding(60, dim, padding_idx=0)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, 1)

    def forward(self, user: Tensor, history: Tensor) -> Tensor:
        rows = self.item(history)  # (rows, length, dim)
        keys, values = F.relu(self.key(rows)), self.value(rows)
        scores = (keys * self.user(user).unsqueeze(1)).sum(dim=2)  # (rows, length)
        weights = scores.softmax(dim=1).unsqueeze(1)  # (rows, 1, length)
        attended = torch.matmul(weights, values).squeeze(1)  # (rows, dim)
        score: Tensor = self.out(attended).squeeze(1)
        return score


class Normed(nn.Module):
    """A dense layer with batch norm and dropout; the output is a probability."""

    def __init__(self, dim: int = 6, width: int = 12) -> None:
        super().__init__()
        self.user = nn.Embedding(15, dim)
        self.hidden = nn.Linear(dim + 2, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = self.hidden(torch.cat([self.user(user), price], dim=1))
        x = F.dropout(F.relu(self.norm(x)), 0.3, self.training)
        return torch.sigmoid(self.out(x))


def plan_and_apply(step: Any, model: Model, bench: Bench) -> AppliedStep:
    """Plan and apply a step without the runner and its checks."""
    applied: AppliedStep = step.apply(model, bench, step.plan(model, bench))
    return applied


def default_step(method: type[Step]) -> Step:
    """Return a step with default settings, except a short training and symmetric int2."""
    fields: Mapping[str, Any] = method.model_fields  # type: ignore[attr-defined]
    quickly = {"training": SHORT_TRAINING, "steps": 20}
    settings: dict[str, Any] = {
        name: value
        for name, value in quickly.items()
        if name in fields and fields[name].get_default(call_default_factory=True) is not None
    }
    # With offsets, the step would store the narrow tables of the references as int4, which takes
    # no more bytes.
    if fields["kind"].default == "rowwise_int2":
        settings["symmetric"] = True
    return method(**settings)


@dataclass(frozen=True)
class Reference:
    """A network of the tests: its class, its signature, and ``config``, the class's arguments."""

    network: type[nn.Module]
    signature: Signature
    config: Mapping[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> Model:
        """Return the network as a bundle would be loaded, with random weights from ``seed``."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = self.network(**self.config)
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm1d):  # statistics of a trained network
                    nn.init.uniform_(layer.running_mean, -0.5, 0.5)
                    nn.init.uniform_(layer.running_var, 0.5, 2.0)
        path = f"models:{self.network.__name__}"
        description = Network(architecture=Architecture(path=path, config=dict(self.config)))
        return Model(replace_pointwise_convs(module).eval(), self.network, description)

    def rows_of_tables(self) -> dict[str, int]:
        """Return the number of rows of every table that an input names."""
        return rows_of_tables(self.model().module, self.signature)

    def bench(self, folder: Path) -> Bench:
        """Write 96 random rows for each split to ``folder`` and return the bench.

        Labels and soft labels are the opposite of the network's predictions, so that training can
        improve the metric.
        """
        tables = self.rows_of_tables()
        parts = {
            part: write_split(self.signature, tables, folder / part, seed, self.label_scores)
            for seed, part in enumerate(("calibration", "train", "validation"), start=7)
        }
        (rows,) = batches(parts["train"], self.signature, BENCH_ROWS)
        soft_labels = folder / "soft_labels"
        soft_labels.mkdir(exist_ok=True)
        save_file({"score": self.label_scores(rows.inputs)}, soft_labels / "data.safetensors")
        soft = Split(path=str(soft_labels), sha256="1" * 64, rows=BENCH_ROWS)
        return Bench(signature=self.signature, soft_labels=soft, **parts)

    def label_scores(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the scores from which labels are drawn: the opposite of the network's scores.

        They are the negated scores, or 1 minus the probabilities: float32 ``(rows,)``, or
        ``(rows, outputs)`` for several outputs.
        """
        with torch.no_grad():
            scores = network_scores(self.model().module, inputs, self.signature)
        columns = [
            1 - column if output.form == "probability" else -column
            for output, column in zip(self.signature.outputs, score_columns(scores), strict=True)
        ]
        return join_columns(columns)


def signature_of(*inputs: Any, group: str | None = None, **changes: Any) -> Signature:
    """Return a signature with one output; ``changes`` replace fields of that output."""
    fields = {"name": "label", "kind": "ctr", "label": "label", "metric": "auc", **changes}
    return Signature(inputs=inputs, outputs=(Output(**fields),), group=group)


RANKER = Reference(
    Ranker,
    signature_of(
        IdInput(name="user", table="user"),
        IdInput(name="item", table="item", out_of_range="clamp"),
        IdInput(
            name="city", table="city", dtype="int32", out_of_range="default_row", default_row=3
        ),
        PaddedBag(name="genres", table="genres", shape=(4,)),
        JaggedBag(name="history", table="history", shape=(LONGEST,)),
        JaggedBag(
            name="tags",
            table="tags",
            shape=(LONGEST,),
            dtype="int32",
            layout="lengths",
            out_of_range="default_row",
            default_row=2,
        ),
        DenseInput(name="price", shape=(3,)),
        form="logit",
    ),
)
COMPACT = Reference(
    Compact,
    signature_of(
        IdInput(name="item", table="item", out_of_range="clamp"),
        IdInput(name="genres", table="genres", columns=("first", "second"), shape=(2,)),
        DenseInput(name="price", shape=(3,)),
        form="logit",
    ),
)
TIED = Reference(
    Tied,
    signature_of(
        *(IdInput(name=name, table=name) for name in ("item", "similar", "user")),
        IdInput(name="friend", table="user"),
        form="logit",
    ),
)
BUFFERED = Reference(
    Buffered,
    signature_of(
        IdInput(name="fields", table="fields", columns=("a", "b", "c"), shape=(3,)),
        form="logit",
    ),
)
ATTENTION = Reference(
    Attention,
    signature_of(
        IdInput(name="user", table="user"),
        PaddedBag(name="history", table="item", shape=(6,)),
        form="score",
        kind="ranking",
        group="user",
        metric="ndcg@10",
    ),
)
NORMED = Reference(
    Normed,
    signature_of(
        IdInput(name="user", table="user"),
        DenseInput(name="price", shape=(2,)),
        form="probability",
    ),
)
MULTI_TASK = Reference(
    MultiTaskNet,
    Signature(
        inputs=(
            IdInput(name="user", table="user"),
            IdInput(name="item", table="item", out_of_range="clamp"),
            DenseInput(name="price", shape=(3,)),
        ),
        outputs=(
            Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),
            Output(
                name="like",
                kind="ctr",
                form="logit",
                label="like",
                label_where="click",
                metric="auc",
                loss_weight=0.5,
            ),
            Output(name="buy", kind="ctr", form="probability", label="buy", metric="auc"),
        ),
    ),
    {"users": 40, "items": 30, "dense": 3, "dim": 8, "hidden": 16},
)
"""Several outputs of different forms; not in ``REFERENCES``, as few methods treat outputs."""
REFERENCES = (RANKER, TIED, BUFFERED, ATTENTION, NORMED)
# With COMPACT, which is used instead of RANKER if a network is exported for many recipes.
BY_NAME = {reference.network.__name__: reference for reference in (*REFERENCES, COMPACT)}


def write_split(
    signature: Signature,
    rows_of_table: dict[str, int],
    folder: Path,
    seed: int = 7,
    score_function: Callable[[dict[str, Tensor]], Tensor] | None = None,
    rows: int = BENCH_ROWS,
) -> Split:
    """Write a split of random rows in the format that ``compressors.core.batches`` reads.

    Labels alternate between 0 and 1. With a ``score_function`` of the inputs, a label is 1 if the
    score is above the median of its output. A label of an output with ``label_where`` is NaN in
    every third row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = generate_data(signature, rows_of_table, rows, seed=seed)
    label = torch.arange(rows, dtype=torch.float32) % 2
    if score_function is not None:
        scores = score_function(model_inputs(data, signature))
        label = (scores > scores.median(dim=0).values).to(torch.float32)
    for column, output in enumerate(signature.outputs):
        if output.label_where is not None:
            label.view(rows, -1)[::3, column] = torch.nan
    data["@label"] = label
    if signature.group is not None:
        data["@group"] = torch.arange(rows) // 8
    save_file(data, folder / "data.safetensors")
    return Split(path=str(folder), sha256="0" * 64, rows=rows)


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of a module's state, which shares no memory with it."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# --- cached exports, as an export takes one to three seconds ---------------------------------

_SCRATCH = tempfile.TemporaryDirectory(prefix="lowered-")


def only_served_graph(signature: Signature) -> ServedGraph:
    """Return the description of the graph that a model without towers is exported to."""
    (served_graph,) = served_graphs(signature)
    return served_graph


@dataclass(frozen=True)
class Graph:
    """The exported graph of a compressed reference for one target.

    Attributes:
        model: the compressed model.
        lowered: the result of ``lower``; its ``wrapper`` is the module that the graph computes.
        signature: inputs and outputs of the graph.
        path: the ONNX file.
        target: name of the target.
    """

    model: Model
    lowered: Lowered
    signature: Signature
    path: Path
    target: TargetName = "onnxruntime"

    def rows(self, count: int, seed: int = 5) -> dict[str, Tensor]:
        """Return random inputs with ids within the tables."""
        return generate_inputs(self.signature, self.lowered.wrapper.rows_of_table, count, seed)

    def run_in_torch(self, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
        """Return the scores of the wrapper in torch, which also handles ids out of range."""
        with torch.no_grad():
            scores: Tensor = self.lowered.wrapper(*(inputs[n] for n in input_names(self.signature)))
        return scores.numpy()

    def run_in_onnx(self, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
        """Return the graph's scores in ONNX Runtime, which also runs graphs for TensorRT."""
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        path = self.path
        if self.target != "onnxruntime" and has_bfloat16_matmuls(self.model.plan):
            # ONNX Runtime has no bfloat16 matmul on CPUs, so a copy with float32 matmuls is run.
            path = path.with_name("checked.onnx")
            write_checkable(self.path, path)
        return Session(path, threads=1).scores(arrays)


@functools.cache
def compress_reference(reference_name: str, kinds: tuple[str, ...]) -> Model:
    """Return the model of a reference after steps of these kinds with default settings."""
    reference = BY_NAME[reference_name]
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    methods = {method.model_fields["kind"].default: method for method in METHODS}  # type: ignore[attr-defined]
    model, bench = reference.model(), reference.bench(folder / "data")
    for number, kind in enumerate(kinds):
        model = run(default_step(methods[kind]), model, bench, folder / str(number))
    return model


@functools.cache
def lower_reference(reference_name: str, kinds: tuple[str, ...], target: TargetName) -> Graph:
    """Return the graph of a compressed reference; of the uncompressed one if ``kinds`` is empty."""
    reference = BY_NAME[reference_name]
    model = compress_reference(reference_name, kinds)
    path = Path(tempfile.mkdtemp(dir=_SCRATCH.name)) / "model.onnx"
    lowered = lower(model.module, only_served_graph(reference.signature), target, path)
    return Graph(model, lowered, reference.signature, path, target)
