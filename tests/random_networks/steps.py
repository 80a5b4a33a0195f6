"""Steps for random networks, with random settings.

A mixed pass (``passes.check_mixed_formats``) applies value-changing steps first. It then assigns
different formats to the tables and layers, so one graph covers many formats. The assignment depends
on the seed, so over a range of seeds every format is lowered for every target many times.
"""

import random
from collections.abc import Callable
from typing import Any

from compressors.contracts import TargetName
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.recalibrate import Recalibrate
from compressors.distill.refit_codes import RefitCodes
from compressors.distill.training.settings import Training
from compressors.factorize.low_rank import LowRank
from compressors.factorize.low_rank_dense import LowRankDense
from compressors.factorize.multi_hash import MultiHash
from compressors.factorize.neural_codes import NeuralCodes
from compressors.factorize.quotient_remainder import QuotientRemainder
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.drop_layers import DropLayers
from compressors.prune.dense.l1_training import L1Training
from compressors.prune.dense.magnitude import Magnitude
from compressors.prune.dense.sparse_2_4 import Sparse24
from compressors.prune.tables.cluster_rows import ClusterRows
from compressors.prune.tables.dimensions import Dimensions
from compressors.prune.tables.drop_tables import DropTables
from compressors.prune.tables.merge_rows import MergeRows
from compressors.prune.tables.prune_rows import PruneRows
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from compressors.quantize.dense.float8_dense import Float8Dense
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.qat import QAT
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.weight_int4 import WeightInt4
from compressors.quantize.dense.weight_int8 import WeightInt8
from compressors.quantize.tables.additive_codes import AdditiveCodes
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.quantize.tables.table_qat import TableQAT
from compressors.rewrite.equalize import Equalize
from compressors.rewrite.fold import Fold
from compressors.rewrite.smooth_quant import SmoothQuant

SHORT_TRAINING = Training(epochs=1, batch=32, learning_rate=0.01, warmup=0)
Draw = Callable[[random.Random, tuple[str, ...]], Any]
"""Returns a step with random settings for the tables or layers with these names."""


def _rowwise_format(kind: Any) -> Draw:
    """Return a function that draws a step of class ``kind`` for a row-wise format."""

    def draw(rng: random.Random, names: tuple[str, ...]) -> Any:
        settings = {} if kind is Float8E4M3 else {"symmetric": rng.random() < 0.5}
        if kind is not Float8E4M3:
            settings["clipping"] = rng.choice(("min_max", "mse", "least_squares", "greedy"))
        scale = rng.choice(("float16", "float32"))
        return kind(
            tables=names, scale=scale, rows_per_scale=rng.choice((1, 1, 2, 8, 0)), **settings
        )

    return draw


def _table_step(kind: Any, **ranges: tuple[Any, ...]) -> Draw:
    """Return a function that draws a step of class ``kind``, each setting from its ``ranges``."""

    def draw(rng: random.Random, names: tuple[str, ...]) -> Any:
        return kind(tables=names, **{key: rng.choice(values) for key, values in ranges.items()})

    return draw


# Steps for tables by kind: formats, and methods that replace a table.
TABLES: dict[str, Draw] = {
    "rowwise_int8": _rowwise_format(RowwiseInt8),
    "rowwise_int4": _rowwise_format(RowwiseInt4),
    "rowwise_int2": _rowwise_format(RowwiseInt2),
    "float8_e4m3": _rowwise_format(Float8E4M3),
    "kmeans": _table_step(KMeans, bits=(2, 4, 8), scale=("none", "float16", "float32")),
    "product_codes": _table_step(
        ProductCodes,
        parts=(1, 2, 4),
        bits=(2, 4, 8),
        codebook_type=("float32", "float16"),
        codebook_share=(0.5, 1.0),
    ),
    "residual_codes": _table_step(
        ResidualCodes,
        codebooks=(1, 2, 3),
        bits=(2, 4, 8),
        refine=(2,),
        codebook_type=("float32", "float16"),
        codebook_share=(0.5, 1.0),
    ),
    "additive_codes": _table_step(
        AdditiveCodes, codebooks=(2,), bits=(2, 4), rounds=(2,), beam=(2,), codebook_share=(1.0,)
    ),
    "bfloat16": _table_step(BFloat16),
    # This step accepts tables and layers; here it names no layers, and in ``LAYERS`` no tables.
    "float16": _table_step(Float16, layers=((),)),
    "low_rank": _table_step(LowRank, rank=(0.25, 0.5)),
    "dimensions": _table_step(Dimensions, keep=(0.5, 0.7)),
    "quotient_remainder": _table_step(
        QuotientRemainder, operation=("add", "multiply"), buckets=(0, 0.3)
    ),
    "multi_hash": _table_step(
        MultiHash, hashes=(1, 2, 3), signed=(True, False), draws=(1,), buckets=(0.3, 0.5)
    ),
    "neural_codes": _table_step(NeuralCodes, steps=(5,), hidden=(4, 8), codes=(0.3, 0.5)),
    "merge_rows": _table_step(MergeRows, within=(0.0, 0.5)),
    "cluster_rows": _table_step(ClusterRows, hot=(0.2,), clusters=(0.1, 0.5)),
    "prune_rows": _table_step(
        PruneRows,
        keep=(0.3, 0.6),
        importance=("lookups", "norm"),
        pruned=("nearest", "shared", "zero"),
    ),
    "tiers": _table_step(Tiers, hot=(0.1, 0.5)),
    "drop_tables": _table_step(DropTables, most_loss=(0.5,), repeats=(1,)),
    "table_qat": _table_step(
        TableQAT, bits=(8, 4, 2), rows_per_scale=(1, 8), training=(SHORT_TRAINING,)
    ),
}
# Methods that replace a table by smaller tables, which can be quantized afterwards.
COMPOSING = {
    "low_rank", "dimensions", "quotient_remainder", "multi_hash", "neural_codes", "merge_rows",
    "cluster_rows", "prune_rows", "tiers",
}  # fmt: skip


def _dense_step(kind: Any, **ranges: tuple[Any, ...]) -> Draw:
    """Return a function like that of ``_table_step``, for a step that names dense layers."""

    def draw(rng: random.Random, names: tuple[str, ...]) -> Any:
        return kind(layers=names, **{key: rng.choice(values) for key, values in ranges.items()})

    return draw


# Settings of layers with quantized weights; ``block`` is how many inputs share a scale (0: all).
BLOCKS = {
    "block": (0, 16, 32, 64),
    "scale": ("float16", "float32"),
    "activations": ("float32", "int8"),
}
# Steps for dense layers by kind: formats, and low rank.
LAYERS: dict[str, Draw] = {
    "static_int8": _dense_step(
        StaticInt8,
        calibrator=("min_max", "mse", "percentile"),
        input_scales=("layer", "channel"),
        weights=("min_max", "mse"),
    ),
    "weight_int8": _dense_step(WeightInt8, **BLOCKS),
    "weight_int4": _dense_step(WeightInt4, **BLOCKS, clipping=("min_max", "mse")),
    "float8_dense": _dense_step(Float8Dense, scales=("channel", "layer")),
    "bfloat16_dense": _dense_step(BFloat16Dense),
    "float16": _dense_step(Float16, tables=((),)),
    "low_rank_dense": _dense_step(LowRankDense, rank=(0.25, 0.5), weighted=(True, False)),
    "qat": _dense_step(QAT, training=(SHORT_TRAINING,)),
}
TRAINS = {"qat", "table_qat"}
"""Steps that also train weights and norms, so that they are checked alone."""
# Steps that change values or shapes of the whole network, not the format.
VALUES: dict[str, Callable[[random.Random], Any]] = {
    "fold": lambda _: Fold(),
    "equalize": lambda _: Equalize(),
    "smooth_quant": lambda rng: SmoothQuant(alpha=rng.choice((0.3, 0.5, 0.8))),
    "magnitude": lambda rng: Magnitude(share=0.5, scope=rng.choice(("layer", "global"))),
    "sparse_2_4": lambda rng: Sparse24(reconstruct=rng.random() < 0.5),
    "channels": lambda rng: Channels(
        keep=0.5,
        multiple=rng.choice((1, 2, 8)),
        importance=rng.choice(("l1", "l2", "activation", "random")),
        reconstruct=rng.random() < 0.3,
    ),
    "drop_layers": lambda _: DropLayers(),
    "l1_training": lambda _: L1Training(training=SHORT_TRAINING),
    "fine_tune": lambda _: FineTune(training=SHORT_TRAINING),
    "distill": lambda _: Distill(training=SHORT_TRAINING),
}
# Steps that a mixed pass applies after all others.
LAST: dict[str, Callable[[random.Random], Any]] = {
    "recalibrate": lambda rng: Recalibrate(method=rng.choice(("temperature", "platt", "isotonic"))),
    "refit_codes": lambda _: RefitCodes(rounds=1, training=SHORT_TRAINING),
}
TARGETS: tuple[TargetName, ...] = ("onnxruntime", "tensorrt", "tensorrt-rtx")
