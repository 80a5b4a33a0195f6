"""Every compression method. To add one: write its file, then list it here.

The union is a recipe line, a form in the Prefect UI and a cache key at once; ``kind`` tells the
methods apart. ``TABLE_FORMATS`` and ``LINEAR_FORMATS`` are how stored tensors become modules.
"""

from typing import Annotated

from pydantic import Field

from compressors.composed import Composition
from compressors.dense import (
    bfloat16_dense,
    float8_dense,
    float16,
    static_int8,
    weight_int4,
    weight_int8,
)
from compressors.dense.bfloat16_dense import BFloat16Dense
from compressors.dense.channels import Channels
from compressors.dense.drop_layers import DropLayers
from compressors.dense.equalize import Equalize
from compressors.dense.float8_dense import Float8Dense
from compressors.dense.float16 import Float16
from compressors.dense.fold import Fold
from compressors.dense.l1_training import L1Training
from compressors.dense.low_rank_dense import LowRankDense
from compressors.dense.magnitude import Magnitude
from compressors.dense.qat import QAT
from compressors.dense.smooth_quant import SmoothQuant
from compressors.dense.sparse_2_4 import Sparse24
from compressors.dense.static_int8 import StaticInt8
from compressors.dense.weight_int4 import WeightInt4
from compressors.dense.weight_int8 import WeightInt8
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.recalibrate import Recalibrate
from compressors.distill.refit_codes import RefitCodes
from compressors.formats import LinearFormat, TableFormat
from compressors.tables import (
    bfloat16,
    drop_tables,
    float8_e4m3,
    kmeans,
    low_rank,
    multi_hash,
    neural_codes,
    product_codes,
    prune_rows,
    quotient_remainder,
    residual_codes,
    row_map,
    rowwise_int2,
    rowwise_int4,
    rowwise_int8,
    tiers,
)
from compressors.tables.additive_codes import AdditiveCodes
from compressors.tables.bfloat16 import BFloat16
from compressors.tables.cluster_rows import ClusterRows
from compressors.tables.dimensions import Dimensions
from compressors.tables.drop_tables import DropTables
from compressors.tables.float8_e4m3 import Float8E4M3
from compressors.tables.kmeans import KMeans
from compressors.tables.low_rank import LowRank
from compressors.tables.merge_rows import MergeRows
from compressors.tables.multi_hash import MultiHash
from compressors.tables.neural_codes import NeuralCodes
from compressors.tables.product_codes import ProductCodes
from compressors.tables.prune_rows import PruneRows
from compressors.tables.quotient_remainder import QuotientRemainder
from compressors.tables.residual_codes import ResidualCodes
from compressors.tables.rowwise_int2 import RowwiseInt2
from compressors.tables.rowwise_int4 import RowwiseInt4
from compressors.tables.rowwise_int8 import RowwiseInt8
from compressors.tables.tiers import Tiers

AnyStep = Annotated[
    Fold
    | Equalize
    | SmoothQuant
    | Magnitude
    | Sparse24
    | L1Training
    | Channels
    | DropLayers
    | Distill
    | FineTune
    | DropTables
    | MergeRows
    | ClusterRows
    | PruneRows
    | Tiers
    | RefitCodes
    | LowRank
    | LowRankDense
    | Dimensions
    | QuotientRemainder
    | MultiHash
    | NeuralCodes
    | RowwiseInt8
    | RowwiseInt4
    | KMeans
    | ProductCodes
    | ResidualCodes
    | RowwiseInt2
    | Float8E4M3
    | BFloat16
    | AdditiveCodes
    | QAT
    | StaticInt8
    | WeightInt8
    | WeightInt4
    | Float8Dense
    | BFloat16Dense
    | Float16
    | Recalibrate,
    Field(discriminator="kind"),
]

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
