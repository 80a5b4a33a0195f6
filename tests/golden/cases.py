"""Cases of the golden test: reference networks, and the recipes that are applied to them.

A single case is one method with one choice of settings on one network. A mixed case applies several
methods, most of them to different units of a network, so that a few exported graphs cover all
methods. A case called ``plain`` has no steps. The default tier checks the mixed cases that name a
target in ``sample``; the nightly tier checks all cases.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.draft_network import ClickNet, TowerNet
from tests.golden import package
from tests.golden.package import Bench, DenseInput, IdInput, JaggedBag, Signature
from tests.models import BENCH_ROWS, RANKER, Reference, write_split
from tests.narrow_networks import HISTORY, Transformer
from tests.signatures import replace_output

# Signatures of the networks "ranking", "towers" and "pairs" in NETWORKS.
RANKING = replace_output(
    HISTORY.model_copy(update={"group": "user"}), kind="ranking", form="score", metric="ndcg@10"
)
TOWERS = Signature.model_validate(
    {
        "group": "user",
        "item": "item",
        "inputs": [
            IdInput(name="user", table="of_user.user").model_dump(),
            JaggedBag(name="lately", table="of_user.lately", shape=(4,)).model_dump(),
            IdInput(name="item", table="of_item.item").model_dump(),
            JaggedBag(name="tags", table="of_item.tags", shape=(4,)).model_dump(),
            DenseInput(name="dense", shape=(3,)).model_dump(),
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
        "towers": {
            "query": {"module": "of_user", "inputs": ["user", "lately"]},
            "item": {"module": "of_item", "inputs": ["item", "tags", "dense"]},
        },
    }
)


class NormedTransformer(Transformer):
    """The transformer with layer norms that differ from the identity, as after training."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers=layers)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)


PAIRS = replace_output(
    TOWERS, name="label", kind="ctr", form="logit", label="label", metric="auc"
).model_copy(
    update={
        "group": None,
        "item": None,
        "towers": None,
        "inputs": (
            IdInput(name="user", table="user"),
            IdInput(name="item", table="item"),
            JaggedBag(name="tags", table="tags", shape=(4,)),
            DenseInput(name="dense", shape=(3,)),
        ),
    }
)
PAIRS_CONFIG = {"users": 60, "items": 80, "tags": 40, "dense": 3, "dim": 8, "hidden": 16}
TOWERS_CONFIG = {"users": 60, "items": 80, "tags": 40, "dense": 3, "dim": 16, "hidden": 32}
# click: ids, three kinds of bags, a cross layer and a perceptron. ranking: a transformer with layer
# norms over a padded history. Only in mixed cases: towers, which has two graphs; pairs, whose two
# id tables ONNX Runtime looks up together and whose int8 layers are connected by a ReLU.
NETWORKS: dict[str, Reference] = {
    "click": RANKER,
    "ranking": Reference(NormedTransformer, RANKING),
    "towers": Reference(TowerNet, TOWERS, TOWERS_CONFIG),
    "pairs": Reference(ClickNet, PAIRS, PAIRS_CONFIG),
}
SINGLE = ("click", "ranking")
"""The networks of the single cases."""

Steps = tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Case:
    """Steps on one network.

    Attributes:
        name: name of the case.
        network: a key of ``NETWORKS``.
        steps: kind and settings of each step.
        sample: the target for which the default tier lowers the case; empty: only the nightly tier
            checks it.
    """

    name: str
    network: str
    steps: Steps
    sample: str = ""


# Steps that a method requires before it.
BEFORE: dict[str, Steps] = {"refit_codes": (("product_codes", {}),)}
# Settings with which a method changes these small networks, or runs in a short time.
SETTINGS: dict[str, dict[str, Any]] = {
    "additive_codes": {"codebooks": 2, "rounds": 4, "beam": 4},
    "drop_tables": {"most_loss": 0.5, "repeats": 1},
    "merge_rows": {"within": 0.5},
    "neural_codes": {"hidden": 8},
    "refit_codes": {"rounds": 2},
}
# Steps that train: training amplifies differences in the last bit of a sum.
TRAINING = frozenset(
    {"distill", "fine_tune", "l1_training", "neural_codes", "qat", "refit_codes", "table_qat"}
)
# Storage layouts and searches that default settings do not cover: name -> method, settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rowwise_int8 with offsets": ("rowwise_int8", {"symmetric": False, "scale": "float32"}),
    "rowwise_int4 with offsets": ("rowwise_int4", {"symmetric": False, "rows_per_scale": 4}),
    "rowwise_int2 with offsets": ("rowwise_int2", {"symmetric": False}),
    "kmeans without scales": ("kmeans", {"bits": 2, "scale": "none"}),
    "product_codes in 3 parts": (
        "product_codes",
        {"parts": 3, "bits": 4, "codebook_type": "float16"},
    ),
    "residual_codes of 4 bits": (
        "residual_codes",
        {"codebooks": 3, "bits": 4, "codebook_type": "float16"},
    ),
    "static_int8 by error": ("static_int8", {"calibrator": "mse", "weights": "mse"}),
    "static_int8 by channel": ("static_int8", {"input_scales": "channel"}),
    "weight_int8 in blocks": ("weight_int8", {"block": 16, "scale": "float32"}),
    "weight_int4 in blocks": (
        "weight_int4",
        {"block": 16, "scale": "float32", "activations": "int8", "rounding": "gptq"},
    ),
    "float8_dense by layer": ("float8_dense", {"scales": "layer"}),
    "prune_rows to zero": ("prune_rows", {"importance": "norm", "pruned": "zero"}),
    "multi_hash with signs": ("multi_hash", {"hashes": 3, "signed": True, "weighted": True}),
    "quotient_remainder product": ("quotient_remainder", {"operation": "multiply"}),
    "channels refitted": ("channels", {"importance": "activation", "reconstruct": True}),
    "recalibrate isotonic": ("recalibrate", {"method": "isotonic"}),
}
# The tables and layers are those of the networks in NETWORKS. "plain" is a layer of "click", and
# also the name of the cases without steps.
MIXED: tuple[Case, ...] = (
    Case(
        "mixed 1",
        "click",
        (
            ("rowwise_int8", {"tables": ("user",)}),
            ("product_codes", {"tables": ("item",)}),
            ("bfloat16", {"tables": ("city",)}),
            ("rowwise_int4", {"tables": ("genres",)}),
            ("residual_codes", {"tables": ("history",)}),
            ("prune_rows", {"tables": ("tags",)}),
            ("static_int8", {"layers": ("cross",)}),
            ("weight_int8", {"layers": ("hidden",)}),
            ("weight_int4", {"layers": ("capped",)}),
            ("float16", {"tables": (), "layers": ("plain",)}),
            ("bfloat16_dense", {"layers": ("out",)}),
        ),
        "onnxruntime",
    ),
    Case(
        "mixed 2",
        "click",
        (
            ("equalize", {}),
            ("drop_tables", {"tables": ("city",), "most_loss": 0.5, "repeats": 1}),
            ("rowwise_int2", {"tables": ("user",)}),
            ("tiers", {"tables": ("item",)}),
            ("kmeans", {"tables": ("genres",)}),
            ("low_rank", {"tables": ("history",)}),
            ("float8_e4m3", {"tables": ("tags",)}),
            ("low_rank_dense", {"layers": ("cross",)}),
            ("float8_dense", {"layers": ("hidden",)}),
            ("qat", {"layers": ("capped",)}),
        ),
        "tensorrt",
    ),
    Case(
        "mixed 3",
        "click",
        (
            ("channels", {}),
            ("magnitude", {"layers": ("cross",)}),
            ("sparse_2_4", {"layers": ("capped",)}),
            ("dimensions", {"tables": ("user",)}),
            ("quotient_remainder", {"tables": ("item",)}),
            ("cluster_rows", {"tables": ("city",)}),
            ("merge_rows", {"tables": ("genres",), "within": 0.5}),
            ("multi_hash", {"tables": ("history",)}),
            ("additive_codes", {"tables": ("tags",), **SETTINGS["additive_codes"]}),
            ("refit_codes", {"rounds": 1}),
            ("recalibrate", {}),
        ),
        "tensorrt-rtx",
    ),
    Case(
        "mixed 4",
        "ranking",
        (
            ("drop_layers", {}),
            ("smooth_quant", {}),
            ("fold", {}),
            ("l1_training", {}),
            ("distill", {}),
            ("fine_tune", {}),
            ("neural_codes", SETTINGS["neural_codes"]),
        ),
        "onnxruntime",
    ),
    Case(
        "mixed 6",
        "pairs",
        (("rowwise_int8", {"tables": ("user", "item")}), ("static_int8", {})),
        "onnxruntime",
    ),
    Case("mixed 7", "pairs", (("product_codes", {}), ("weight_int4", {}))),
    Case("mixed 8", "ranking", (("table_qat", {}), ("fold", {})), "onnxruntime"),
    Case("plain", "click", ()),
    Case("plain", "ranking", ()),
    Case("plain", "towers", ()),
    Case(
        "mixed 5",
        "towers",
        (
            ("rowwise_int8", {"tables": ("of_user.user", "of_item.item")}),
            ("product_codes", {"tables": ("of_user.lately",)}),
            ("rowwise_int4", {"tables": ("of_item.tags",)}),
            ("static_int8", {"layers": ("of_user.*",)}),
            ("weight_int8", {"layers": ("of_item.*",)}),
        ),
    ),
)


def list_single_cases() -> list[Case]:
    """Return every method on each network of ``SINGLE``, and every variant on the first."""
    kinds = {kind: (kind, SETTINGS.get(kind, {})) for kind in package.list_methods()} | VARIANTS
    return [
        Case(name, network, (*BEFORE.get(last[0], ()), last))
        for name, last in kinds.items()
        for network in (SINGLE if name not in VARIANTS else SINGLE[:1])
    ]


def build_bench(network: str, kinds: tuple[str, ...], folder: Path) -> Bench:
    """Return the bench of a network; ``kinds`` are the kinds of the case's steps.

    With ``recalibrate``, validation labels correlate with the network's scores.
    """
    reference = NETWORKS[network]
    bench = reference.bench(folder)
    if "recalibrate" not in kinds:
        return bench
    module = reference.model().module
    noise = torch.randn(BENCH_ROWS, generator=torch.Generator().manual_seed(0))

    def compute_noisy_scores(inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            scores: Tensor = module(**inputs).reshape(-1)
        return scores + scores.std() * noise

    validation = write_split(
        reference.signature,
        reference.rows_of_tables(),
        folder / "agreeing",
        seed=9,  # that of the bench's validation rows, so that only the labels differ
        score_function=compute_noisy_scores,
    )
    return bench.model_copy(update={"validation": validation})


def list_all_cases() -> list[Case]:
    """Return all cases of the record."""
    return [*MIXED, *list_single_cases()]
