"""Generate a random network from a seed: its parts, its signature and its weights.

A seed determines the network on every machine. The weights of a module depend only on the seed and
on the module's name, so removing some parts of a network does not change the weights of the others.
Only the last layers, which ``spread_scores`` scales, depend on the whole network.

A spec describes one part: ``name``, ``kind`` (its class), ``settings``, and the names of what it
reads: ``takes`` (other parts) or ``inputs``. With ``shares`` it uses the table module of the named
part, with ``ties`` only the table's weight. ``head`` holds the settings of the last layers
(``RandomNetwork`` and ``Tower`` in ``network.py``).
"""

import copy
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from compressors.contracts import Architecture, Network, Output, Signature
from compressors.core.model import Model
from compressors.core.modules.pointwise import replace_pointwise_convs
from tests.random_networks.inputs import draw_typical_rows
from tests.random_networks.network import RandomNetwork, TwoTowers
from tests.random_networks.parts import PARTS, draw_activation

SOURCE_KINDS = (
    "Lookup",
    "Lookup",
    "Lookup",
    "Fields",
    "PaddedBag",
    "JaggedBag",
    "History",
    "Dense",
)
"""Kinds of parts that read inputs.

In this and the other tuples, repeated values are drawn more often.
"""
SHAREABLE = ("Lookup", "History", "Fields")
"""Kinds of parts whose table other parts may share."""
MAX_WIDTH = 120
"""Parts with a larger output are not added."""
OPERATIONS = tuple(
    name for name, kind in PARTS.items() if kind.takes and name not in ("TiedOutput",)
)
"""Kinds of parts that read other parts."""
POLICIES = ("error", "error", "clamp", "default_row")
"""Values of ``out_of_range``: what a graph does with ids outside of a table."""
SCALES = (1.0, 1.0, 1.0, 0.01, 30.0, 1000.0)
"""Standard deviations of dense inputs."""
TABLE_SCALES = (0.01, 0.1, 0.3, 0.3, 1.0, 1.0, 3.0)
"""Standard deviations of the weights of a table."""


@dataclass(frozen=True)
class Case:
    """One random network: its config, its signature, and the scales of its dense inputs."""

    seed: int
    config: dict[str, Any]
    signature: Signature
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def network(self) -> type[nn.Module]:
        """The class of the network."""
        return TwoTowers if self.signature.single_output.kind == "retrieval" else RandomNetwork

    def model(self) -> Model:
        """Return the network with its weights, like a model loaded from a bundle."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module = self.network(**copy.deepcopy(self.config)).eval()
        set_weights(module, self.seed)
        spread_scores(module, self)
        name = self.network.__name__
        path = f"tests.random_networks.network:{name}"
        description = Network(architecture=Architecture(path=path, config=self.config))
        return Model(replace_pointwise_convs(module), self.network, description)


class Composer:
    """Draws inputs and parts of one graph, and stores them.

    Attributes:
        prefix: start of the names of parts and inputs; differs between two towers.
        module: path of the graph in the network.
        parts: the specs of all parts, in order.
        inputs: the inputs for the signature.
        sizes: width of each part's output as a vector.
        leaves: names of the parts whose output no other part reads.
        scales: standard deviation of each dense input.
    """

    def __init__(self, rng: random.Random, prefix: str = "", module: str = "graph") -> None:
        self.rng, self.prefix, self.module = rng, prefix, module
        self.parts: list[dict[str, Any]] = []
        self.inputs: list[dict[str, Any]] = []
        self.sizes: dict[str, int] = {}
        self.leaves: list[str] = []
        self.scales: dict[str, float] = {}

    def add_source(self, kind: str) -> None:
        """Add a part that reads inputs, and its inputs."""
        rng, name = self.rng, f"{self.prefix}p{len(self.parts)}"
        spec: dict[str, Any] = {"name": name, "kind": kind, "settings": PARTS[kind].draw(rng)}
        owner = name
        others = [p for p in self.parts if p["kind"] in SHAREABLE and "shares" not in p]
        if kind in SHAREABLE and others and rng.random() < 0.25:
            other = rng.choice(others)
            relation = rng.choice(("shares", "ties"))
            spec[relation] = other["name"]
            spec["settings"].update({key: other["settings"][key] for key in ("rows", "dim")})
            owner = other["name"] if relation == "shares" else name
        spec["inputs"] = []
        for index, (form, shape) in enumerate(PARTS[kind].input_specs(spec["settings"])):
            item = self._input(form, shape, owner, spec["settings"], index)
            spec["inputs"] += [item["name"]]
            if form.startswith("jagged"):
                spec["inputs"] += [f"{item['name']}_{item['layout']}"]
        if not self._add(spec):
            self.inputs = [item for item in self.inputs if item["name"] not in spec["inputs"]]

    def _input(
        self, form: str, shape: tuple[int, ...], owner: str, settings: Mapping[str, Any], index: int
    ) -> dict[str, Any]:
        """Add an input of a new part, and return it.

        Args:
            form: kind of the input; of a jagged bag ``jagged_offsets`` or ``jagged_lengths``.
            shape: shape of one row.
            owner: name of the part whose table is looked up.
            settings: settings of the new part.
            index: position among the inputs of the new part.
        """
        rng, name = self.rng, f"{self.prefix}i{len(self.inputs)}"
        item: dict[str, Any] = {"name": name, "shape": shape}
        if form == "dense":
            item["kind"] = "dense"
            # If a part has several inputs, a dense one after the first has a weight for each id.
            self.scales[name] = 1.0 if index else rng.choice(SCALES)
        else:
            item["kind"] = "jagged_bag" if form.startswith("jagged") else form
            item["table"] = f"{self.module}.parts.{owner}.table"
            item["dtype"] = rng.choice(("int64", "int64", "int32"))
            item["out_of_range"] = rng.choice(POLICIES)
            if item["out_of_range"] == "default_row":
                item["default_row"] = rng.randrange(settings["rows"])
            if form.startswith("jagged"):
                item["layout"] = form.removeprefix("jagged_")
        if form in ("id", "dense") and shape:
            item["columns"] = tuple(f"{name}_{n}" for n in range(shape[0]))
        self.inputs.append(item)
        return item

    def add_computed(self, kind: str) -> None:
        """Add a part that looks up ids computed from inputs of other parts."""
        input_kind = PARTS[kind].reads
        names = [
            item["name"]
            for item in self.inputs
            if item["kind"] == input_kind and (input_kind != "id" or item["shape"] == ())
        ]
        count = 2 if kind == "CrossedIds" else 1
        if len(names) < count:
            return
        name = f"{self.prefix}p{len(self.parts)}"
        settings = PARTS[kind].draw(self.rng)
        inputs = self.rng.sample(names, count)
        self._add({"name": name, "kind": kind, "settings": settings, "inputs": inputs})

    def add_operation(self, kind: str) -> None:
        """Add a part that reads other parts, preferably parts without a consumer."""
        rng, name = self.rng, f"{self.prefix}p{len(self.parts)}"
        spec: dict[str, Any] = {"name": name, "kind": kind, "settings": PARTS[kind].draw(rng)}
        spec["takes"] = [self._draw_producer(need) for need in PARTS[kind].takes]
        if kind == "TiedOutput":
            # The part has one output per row of the table, so only small tables are used.
            owners = [
                p for p in self.parts if p["kind"] in SHAREABLE and p["settings"]["rows"] < 40
            ]
            if not owners:
                return
            owner = rng.choice(owners)
            spec["ties"] = owner["name"]
            spec["settings"].update({key: owner["settings"][key] for key in ("rows", "dim")})
        self._add(spec)

    def _draw_producer(self, need: str) -> str:
        """Return the part that a new part reads; ``need`` is the kind of value that it takes.

        Parts without a consumer and with the right kind of output are preferred, then parts with
        the right kind. Otherwise it is any part, whose output is converted.
        """
        rng = self.rng
        kinds = {p["name"]: PARTS[p["kind"]].gives for p in self.parts}
        fitting = [name for name in self.sizes if kinds[name] == need]
        leaves = [name for name in fitting if name in self.leaves]
        for names, chance in ((leaves, 0.85), (fitting, 0.9), (list(self.sizes), 1.0)):
            if names and rng.random() < chance:
                return rng.choice(names)
        return rng.choice(list(self.sizes))

    def _add(self, spec: dict[str, Any]) -> bool:
        from tests.random_networks.network import Graph

        size = Graph([*self.parts, spec]).sizes[spec["name"]][0]
        if size > MAX_WIDTH:
            return False
        self.parts.append(spec)
        self.sizes[spec["name"]] = size
        consumed = set(spec.get("takes", ()))
        self.leaves = [name for name in self.leaves if name not in consumed] + [spec["name"]]
        return True

    def compose(self, sources: int, operations: int) -> None:
        """Draw a graph with this many sources and operations."""
        rng = self.rng
        for _ in range(sources):
            self.add_source(rng.choice(SOURCE_KINDS))
        for kind in ("CrossedIds", "Buckets"):
            if rng.random() < 0.15:
                self.add_computed(kind)
        for _ in range(operations):
            tied = rng.random() < 0.04
            self.add_operation("TiedOutput" if tied else rng.choice(OPERATIONS))


def generate(seed: int) -> Case:
    """Return the network of a seed; every eighth network has two towers."""
    rng = random.Random(f"recpress {seed}")
    return (
        _generate_two_tower_model(seed, rng) if seed % 8 == 7 else _generate_click_model(seed, rng)
    )


def _generate_click_model(seed: int, rng: random.Random) -> Case:
    composer = Composer(rng)
    composer.add_source("Lookup")
    composer.compose(rng.randint(2, 6), rng.randint(2, 8))
    widths = [rng.choice((4, 8, 16, 17)) for _ in range(rng.randint(0, 2))]
    # Ways to remove the last dimension of the logits; "keep" does not remove it. "every", which
    # removes all dimensions of size 1, is drawn rarely.
    squeezes = ("one", "last", "view", "flatten", "index", "keep", "reshape", "sum")
    probability = rng.random() < 0.25
    head = {
        "reads": composer.leaves,
        "wide": [n for n, size in composer.sizes.items() if size == 1 and rng.random() < 0.5],
        "widths": widths,
        "norm": rng.random() < 0.4,
        "activation": draw_activation(rng),
        "squeeze": "every" if rng.random() < 0.03 else rng.choice(squeezes),
        "probability": probability,
    }
    signature = Signature(
        inputs=tuple(composer.inputs),
        outputs=(
            Output(
                name="label",
                kind="ctr",
                form="probability" if probability else "logit",
                label="label",
                metric="auc",
            ),
        ),
    )
    return Case(seed, {"parts": composer.parts, "head": head}, signature, composer.scales)


def _generate_two_tower_model(seed: int, rng: random.Random) -> Case:
    width, normalize = rng.choice((3, 8, 16)), rng.choice(("function", "division", "none"))
    towers = {}
    for side in ("query", "item"):
        towers[side] = Composer(rng, side[0], f"{side}.graph")
        towers[side].add_source("Lookup")
        towers[side].compose(rng.randint(1, 3), rng.randint(1, 4))
    item = next(i for i in towers["item"].inputs if i["kind"] == "id" and not i["shape"])
    inputs = tuple(i for side in towers.values() for i in side.inputs)
    signature = Signature(
        inputs=inputs,
        outputs=(Output(name="score", kind="retrieval", form="score", metric="recall@20"),),
        group="group",
        item=item["name"],
        towers={
            side: {"module": side, "inputs": tuple(i["name"] for i in towers[side].inputs)}
            for side in towers
        },
    )
    config = {
        side: {
            "parts": tower.parts,
            "head": {"reads": tower.leaves, "normalize": normalize, "width": width},
        }
        for side, tower in towers.items()
    }
    scales = {**towers["query"].scales, **towers["item"].scales}
    return Case(seed, config, signature, scales)


def _create_rng(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")


@torch.no_grad()
def set_weights(module: nn.Module, seed: int) -> None:
    """Set all weights to values of realistic magnitude; some rows and layers are unusual."""
    for name, owner in module.named_modules():
        rng = _create_rng(seed, name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for key, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is None or not value.is_floating_point():
                continue
            draw = torch.randn(value.shape, generator=generator)
            if key == "running_var":
                value.copy_(draw.abs() + 0.3)
            elif key == "running_mean":
                value.copy_(0.5 * draw)
            elif isinstance(owner, nn.Embedding | nn.EmbeddingBag):
                _set_table(value, draw, rng, owner.padding_idx)
            elif isinstance(owner, nn.BatchNorm1d | nn.LayerNorm | nn.RMSNorm):
                value.copy_(1 + 0.3 * draw if key == "weight" else 0.2 * draw)
            elif isinstance(owner, nn.PReLU):
                value.copy_(0.25 + 0.1 * draw)
            elif key in ("edges", "wide_scale", "offset"):  # the first is constant
                continue
            elif value.dim() >= 2:
                _set_layer(value, draw, rng, regular=name == "output")
            else:
                default = 1.0 if key in ("weight", "scale") else 0.0
                value.copy_(default + 0.1 * draw)


def _set_table(
    value: torch.Tensor, draw: torch.Tensor, rng: random.Random, padding: int | None
) -> None:
    value.copy_(rng.choice(TABLE_SCALES) * draw)
    row = rng.randrange(len(value))
    form = rng.choice(
        ("typical", "typical", "typical", "zero", "constant", "large", "small", "equal")
    )
    if form == "zero":
        value[row] = 0
    elif form == "constant":
        value[row] = 0.5
    elif form in ("large", "small"):
        value[row] *= 50.0 if form == "large" else 1e-7
    elif form == "equal":
        value[row] = value[0]
    if rng.random() < 0.03:
        value.zero_()
    if padding is not None:
        value[padding] = 0


def _set_layer(
    value: torch.Tensor, draw: torch.Tensor, rng: random.Random, *, regular: bool
) -> None:
    """Set a layer's weight; unless it is ``regular``, some of its rows may be zero or tiny."""
    value.copy_(draw * (rng.choice((0.7, 1.0, 1.5)) / max(value[0].numel(), 1) ** 0.5))
    chance = 1.0 if regular else rng.random()
    if chance < 0.02:
        value.zero_()
    elif chance < 0.06:
        value[rng.randrange(len(value))] = 0  # a dead channel
    elif chance < 0.09:
        value[rng.randrange(len(value))] *= 1e-6


@torch.no_grad()
def spread_scores(module: nn.Module, case: Case) -> None:
    """Scale the last layers so that logits of typical rows have mean 0 and deviation about 1.5."""
    if not isinstance(module, RandomNetwork):
        return
    inputs = draw_typical_rows(
        case.signature, count_rows(module, case.signature), 128, case.scales, case.seed
    )
    values = {name: x.nan_to_num() for name, x in module.graph.values(inputs).items()}
    x = torch.cat([values[name] for name in module.reads], dim=1)
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp(min=1e-3)
    if module.norm is not None:
        module.norm.running_mean.copy_(mean)
        module.norm.running_var.copy_(deviation.square())
    else:
        module.scale.copy_(1 / deviation.clamp(min=x.std() / 100))
    for index, name in enumerate(module.wide):
        size = values[name].sum(dim=1).std()
        module.wide_scale[index] = 0.5 / size if size > 1e-3 else 0.5
    module.offset.zero_()
    outputs: list[torch.Tensor] = []
    hook = module.output.register_forward_hook(lambda *call: outputs.append(call[2].reshape(-1)))
    probability, module.probability = module.probability, False
    logit = module(**inputs).reshape(-1)
    spread = outputs[0].nan_to_num().std()
    scale = 1.5 / spread if spread > 1e-6 else torch.tensor(1.0)
    module.output.weight.mul_(scale)
    module.output.bias.mul_(scale)
    logit = module(**inputs).reshape(-1)
    hook.remove()
    module.probability = probability
    module.offset.sub_(logit.nan_to_num().mean())


def count_rows(module: nn.Module, signature: Signature) -> dict[str, int]:
    """Return the number of rows of each table that an input names."""
    return {
        item.table: module.get_submodule(item.table).num_embeddings
        for item in signature.inputs
        if item.kind != "dense"
    }


def with_config(case: Case, config: dict[str, Any], signature: Signature) -> Case:
    """Return the same case with another config and signature."""
    return replace(case, config=config, signature=signature)
