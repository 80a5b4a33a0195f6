"""The custom PyTorch ops of recpress; importing this file registers those of every format.

The import of a format's module registers its op. The targets' translations refer to the ops of all
formats. So they use ``OPS`` of this file, which imports every format only to register its op.
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
"""Namespace of the custom ops, such as ``OPS.rowwise_int8``."""
