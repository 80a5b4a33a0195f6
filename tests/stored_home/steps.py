"""The recipes of the stored home, with at least one for each compression method.

``RECIPES`` are JSON values as in an order file, so that a step's class can be renamed without a
change here. Their settings cover all layouts of stored tensors: code widths, scale types, offsets,
rows per scale, block sizes and codebook types. ``docs/methods/`` explains the settings. With
``codebook_share`` 1, ``most_loss`` 1, one of ``draws`` and ``repeats``, and few ``refine`` and
``rounds``, the methods apply to these small tables and are fast; these settings change no layout.
Never reuse a name, and never change an entry that a fixture contains. A home is the folder with
everything that recpress stores (``RECPRESS_HOME``).
"""

from typing import Any

Recipe = tuple[dict[str, Any], ...]

# Settings of a short training.
QUICK = {"epochs": 2, "batch": 64, "warmup": 0, "learning_rate": 0.01}


def _table(kind: str, **settings: Any) -> Recipe:
    """Return a recipe of one step for tables."""
    return ({"kind": kind, **settings},)


def _dense(kind: str, **settings: Any) -> Recipe:
    """Return a recipe of one step for all dense layers."""
    return ({"kind": kind, "layers": ["*"], **settings},)


RECIPES: dict[str, tuple[str, Recipe]] = {
    # Quantized tables.
    "rowwise-int8": ("clicks", _table("rowwise_int8")),
    "rowwise-int8-offsets": (
        "clicks",
        _table("rowwise_int8", symmetric=False, scale="float32", clipping="mse"),
    ),
    "rowwise-int8-shared-scale": ("clicks", _table("rowwise_int8", rows_per_scale=0)),
    "rowwise-int4": ("clicks", _table("rowwise_int4", clipping="least_squares")),
    "rowwise-int4-offsets": (
        "clicks",
        _table("rowwise_int4", symmetric=False, scale="float32", rows_per_scale=8),
    ),
    "rowwise-int2": ("clicks", _table("rowwise_int2", clipping="greedy")),
    "rowwise-int2-symmetric": (
        "clicks",
        _table("rowwise_int2", symmetric=True, scale="float32", rows_per_scale=2),
    ),
    "float8-e4m3": ("clicks", _table("float8_e4m3")),
    "float8-e4m3-shared-scale": (
        "clicks",
        _table("float8_e4m3", scale="float32", rows_per_scale=0),
    ),
    "bfloat16": ("clicks", _table("bfloat16")),
    "kmeans-2": ("clicks", _table("kmeans", bits=2, scale="none")),
    "kmeans-4": ("clicks", _table("kmeans", bits=4, scale="float16")),
    "kmeans-8": ("clicks", _table("kmeans", bits=8, scale="float32")),
    "product-codes-8": ("clicks", _table("product_codes", parts=4, bits=8, codebook_share=1.0)),
    "product-codes-4": (
        "clicks",
        _table("product_codes", parts=3, bits=4, codebook_type="float16", codebook_share=1.0),
    ),
    "product-codes-2": ("clicks", _table("product_codes", parts=5, bits=2, codebook_share=1.0)),
    "residual-codes-8": (
        "clicks",
        _table("residual_codes", codebooks=2, bits=8, refine=2, codebook_type="float16"),
    ),
    "residual-codes-4": (
        "clicks",
        _table(
            "residual_codes",
            codebooks=3,
            bits=4,
            refine=2,
            codebook_type="float16",
            codebook_share=1.0,
        ),
    ),
    "residual-codes-2": ("clicks", _table("residual_codes", codebooks=5, bits=2, refine=2)),
    "additive-codes": (
        "clicks",
        _table("additive_codes", codebooks=2, bits=4, rounds=2, beam=2, codebook_share=1.0),
    ),
    # Tables composed of smaller tables.
    "low-rank": ("clicks", _table("low_rank", rank=0.25)),
    "dimensions": ("clicks", _table("dimensions", keep=0.5, importance="lookups")),
    "quotient-remainder": ("clicks", _table("quotient_remainder")),
    "quotient-remainder-product": (
        "clicks",
        _table("quotient_remainder", operation="multiply", buckets=0.2),
    ),
    "multi-hash": ("clicks", _table("multi_hash", buckets=0.3, draws=1)),
    "multi-hash-signed": (
        "clicks",
        _table("multi_hash", buckets=0.2, hashes=3, signed=True, draws=1),
    ),
    "neural-codes": ("clicks", _table("neural_codes", codes=0.3, hidden=8, steps=10)),
    "merge-rows": ("clicks", _table("merge_rows", tables=["user"])),
    "cluster-rows": ("clicks", _table("cluster_rows", hot=0.2, clusters=0.2)),
    "prune-rows-nearest": ("clicks", _table("prune_rows", keep=0.5)),
    "prune-rows-shared": ("clicks", _table("prune_rows", min_lookups=2, pruned="shared")),
    "prune-rows-zero": ("clicks", _table("prune_rows", keep=0.4, importance="norm", pruned="zero")),
    "tiers": ("clicks", _table("tiers", hot=0.2)),
    "drop-tables": (
        "clicks",
        _table("drop_tables", tables=["item", "tags"], most_loss=1.0, repeats=1),
    ),
    # Composed tables with quantized parts.
    "low-rank-then-int4": (
        "clicks",
        (*_table("low_rank", rank=0.5), *_table("rowwise_int4")),
    ),
    "tiers-then-int8-and-int2": (
        "clicks",
        (
            *_table("tiers", hot=0.2),
            *_table("rowwise_int8", tables=["*.hot"]),
            *_table("rowwise_int2", tables=["*.cold"], symmetric=True),
        ),
    ),
    "prune-rows-then-product-codes": (
        "clicks",
        (
            *_table("prune_rows", keep=0.5),
            *_table("product_codes", parts=4, bits=4, codebook_share=1.0),
        ),
    ),
    # Dense layers.
    "static-int8": ("clicks", _dense("static_int8")),
    "static-int8-searched": (  # selects the calibrator for each layer
        "clicks",
        _dense("static_int8", calibrator="best", weights="mse"),
    ),
    "static-int8-channels": ("clicks", _dense("static_int8", input_scales="channel")),
    "weight-int8": ("clicks", _dense("weight_int8")),
    "weight-int8-blocks": (
        "clicks",
        _dense("weight_int8", block=16, scale="float32", activations="float32"),
    ),
    "weight-int4": ("clicks", _dense("weight_int4", block=16)),
    "weight-int4-row-scale": (
        "clicks",
        _dense("weight_int4", block=0, scale="float32", activations="int8", rounding="gptq"),
    ),
    "float8-dense": ("clicks", _dense("float8_dense")),
    "float8-dense-layer-scale": ("clicks", _dense("float8_dense", scales="layer")),
    "bfloat16-dense": ("clicks", _dense("bfloat16_dense")),
    "float16": ("clicks", ({"kind": "float16"},)),
    "qat": ("clicks", _dense("qat", training=QUICK)),
    "table-qat": ("clicks", _table("table_qat", bits=4, rows_per_scale=8, training=QUICK)),
    "low-rank-dense": ("clicks", _dense("low_rank_dense", rank=0.25)),
    "low-rank-dense-then-int8": (
        "clicks",
        (*_dense("low_rank_dense", rank=0.25), *_dense("static_int8")),
    ),
    # Methods that change weights, widths or the number of layers.
    "fold": ("clicks", _dense("fold")),
    "equalize": ("clicks", _dense("equalize")),
    "smooth-quant": ("clicks", _dense("smooth_quant")),
    "magnitude": ("clicks", _dense("magnitude", scope="global")),
    "sparse-2-4": ("clicks", _dense("sparse_2_4")),
    "l1-training": ("clicks", _dense("l1_training", training=QUICK)),
    "channels": ("clicks", _dense("channels", keep=0.5)),
    "drop-layers": ("clicks", _dense("drop_layers")),
    "distill": ("clicks", ({"kind": "distill", "training": QUICK},)),
    "distill-student": (
        "clicks",
        ({"kind": "distill", "training": QUICK, "student": {"blocks": 1}, "loss": "pointwise"},),
    ),
    "fine-tune": ("clicks", ({"kind": "fine_tune", "training": QUICK},)),
    "refit-codes": (
        "clicks",
        (
            *_table("product_codes", parts=4, bits=4, codebook_share=1.0),
            {"kind": "refit_codes", "rounds": 1, "training": QUICK},
        ),
    ),
    # Calibration maps: functions of the score, which ``recalibrate`` fits.
    "recalibrate-temperature": (
        "clicks",
        (*_table("rowwise_int2"), {"kind": "recalibrate", "method": "temperature"}),
    ),
    "recalibrate-platt": (
        "clicks",
        (*_table("rowwise_int2"), {"kind": "recalibrate", "method": "platt"}),
    ),
    "recalibrate-isotonic": (
        "clicks",
        (*_table("rowwise_int2"), {"kind": "recalibrate", "method": "isotonic", "knots": 8}),
    ),
    # Models with groups, and two towers with tied tables.
    "ranker-int4-and-int8": (
        "ranker",
        (*_table("rowwise_int4"), *_dense("fold"), *_dense("static_int8")),
    ),
    "finder-int8-and-float16": (
        "finder",
        (*_table("rowwise_int8"), {"kind": "float16"}),
    ),
    "finder-codes-and-int4": (
        "finder",
        (
            *_table("product_codes", parts=4, bits=4, codebook_share=1.0),
            *_dense("weight_int4", block=16),
        ),
    ),
}
"""Maps the name of a recipe to its model and its steps in order."""
