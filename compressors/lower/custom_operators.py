"""The custom ops of recpress, with the ops of every storage format registered.

The import of a format's module registers its op. The targets' translations refer to the ops of all
formats, so they use ``OPS`` of this module, which imports each format for this effect alone.
"""

import torch

from compressors.factorize import quotient_remainder  # noqa: F401
from compressors.lower import merged_codebooks, merged_tables  # noqa: F401
from compressors.prune.tables import kept_rows, row_map  # noqa: F401
from compressors.quantize.dense import (  # noqa: F401
    bfloat16_dense,
    float8_dense,
    float16,
    static_int8,
    weight_only,
)
from compressors.quantize.tables import (  # noqa: F401
    bfloat16,
    float8_e4m3,
    kmeans,
    product_codes,
    residual_codes,
    rowwise_int2,
    rowwise_int4,
    rowwise_int8,
)

OPS = torch.ops.recpress
"""Namespace of the custom ops."""
