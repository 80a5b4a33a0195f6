"""The list of all compression methods, storage formats and compositions.

A composition builds a table from smaller tables, as a low-rank factorization does. To add a method,
write its file, then list it here or call ``register``. ``AnyStep`` is the type of a line of a
recipe (a list of compression steps), from which the Prefect UI builds its form; ``kind``
distinguishes the methods. A bundle is loaded by looking up the format of its tensors by name.
"""

import functools
from typing import Annotated, Any, Union

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from compressors.core.modules.composed import Composition
from compressors.core.modules.formats import LinearFormat, TableFormat
from compressors.core.steps.step import StepSettings
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.recalibrate import Recalibrate
from compressors.distill.refit_codes import RefitCodes
from compressors.factorize import low_rank, multi_hash, neural_codes, quotient_remainder
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
from compressors.prune.tables import drop_tables, prune_rows, row_map, tiers
from compressors.prune.tables.cluster_rows import ClusterRows
from compressors.prune.tables.dimensions import Dimensions
from compressors.prune.tables.drop_tables import DropTables
from compressors.prune.tables.merge_rows import MergeRows
from compressors.prune.tables.prune_rows import PruneRows
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.dense import (
    bfloat16_dense,
    float8_dense,
    float16,
    static_int8,
    weight_int4,
    weight_int8,
)
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from compressors.quantize.dense.float8_dense import Float8Dense
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.qat import QAT
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.weight_int4 import WeightInt4
from compressors.quantize.dense.weight_int8 import WeightInt8
from compressors.quantize.tables import (
    bfloat16,
    float8_e4m3,
    kmeans,
    product_codes,
    residual_codes,
    rowwise_int2,
    rowwise_int4,
    rowwise_int8,
)
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

METHODS: dict[str, type[StepSettings]] = {
    method.model_fields["kind"].default: method
    for method in (
        Fold,
        Equalize,
        SmoothQuant,
        Magnitude,
        Sparse24,
        L1Training,
        Channels,
        DropLayers,
        Distill,
        FineTune,
        DropTables,
        MergeRows,
        ClusterRows,
        PruneRows,
        Tiers,
        RefitCodes,
        LowRank,
        LowRankDense,
        Dimensions,
        QuotientRemainder,
        MultiHash,
        NeuralCodes,
        RowwiseInt8,
        RowwiseInt4,
        KMeans,
        ProductCodes,
        ResidualCodes,
        RowwiseInt2,
        Float8E4M3,
        BFloat16,
        AdditiveCodes,
        QAT,
        TableQAT,
        StaticInt8,
        WeightInt8,
        WeightInt4,
        Float8Dense,
        BFloat16Dense,
        Float16,
        Recalibrate,
    )
}
"""Every method by its ``kind``, in the order of the JSON schema of a recipe line."""


# Storage formats and compositions by the names that bundles store.
TABLE_FORMATS: dict[str, TableFormat] = {
    form.name: form
    for form in (
        rowwise_int8.FORMAT,
        rowwise_int4.FORMAT,
        kmeans.FORMAT,
        product_codes.FORMAT,
        residual_codes.FORMAT,
        rowwise_int2.FORMAT,
        float8_e4m3.FORMAT,
        bfloat16.FORMAT,
        float16.TABLE_FORMAT,
    )
}
LINEAR_FORMATS: dict[str, LinearFormat] = {
    form.name: form
    for form in (
        static_int8.FORMAT,
        weight_int8.FORMAT,
        weight_int4.FORMAT,
        float8_dense.FORMAT,
        float16.LINEAR_FORMAT,
        bfloat16_dense.FORMAT,
    )
}
COMPOSITIONS: dict[str, Composition] = {
    form.name: form
    for form in (
        low_rank.COMPOSITION,
        row_map.COMPOSITION,
        prune_rows.COMPOSITION,
        tiers.COMPOSITION,
        drop_tables.COMPOSITION,
        quotient_remainder.COMPOSITION,
        multi_hash.COMPOSITION,
        neural_codes.COMPOSITION,
    )
}


def register(method: type[StepSettings], storage: TableFormat | None = None) -> None:
    """Add a method, and the format in which it stores tables.

    Args:
        method: the class of its settings; the default of ``kind`` is its name.
        storage: its table format; None if it has none, or uses a registered one.

    Raises:
        ValueError: a method of this kind, or a format with this name, is already registered.
    """
    kind = method.model_fields["kind"].default
    if kind in METHODS:
        raise ValueError(f"method {kind!r} is already registered")
    if storage is not None and storage.name in {**TABLE_FORMATS, **LINEAR_FORMATS, **COMPOSITIONS}:
        raise ValueError(f"format {storage.name!r} is already registered")
    METHODS[kind] = method
    if storage is not None:
        TABLE_FORMATS[storage.name] = storage


@functools.lru_cache(maxsize=1)
def _build_union_validator(methods: tuple[type[StepSettings], ...]) -> TypeAdapter[StepSettings]:
    """Return the validator of a union of methods, of which ``kind`` selects one."""
    union: Any = Union[methods]  # noqa: UP007 - its members are known at run time
    return TypeAdapter(Annotated[union, Field(discriminator="kind")])


class _AnyMethod:
    """Validates a recipe line as one of the registered methods, which ``kind`` selects."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            lambda value, info: _build_union_validator(tuple(METHODS.values())).validate_python(
                value, context=info.context
            )
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(_build_union_validator(tuple(METHODS.values())).core_schema)


AnyStep = Annotated[StepSettings, _AnyMethod()]
"""A line of a recipe: the settings of any registered method."""
