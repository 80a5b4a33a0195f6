"""Every compression method. To add one: write its file, then list it here.

The union is a recipe line, a form in the Prefect UI and a cache key at once; ``kind`` tells the
methods apart. ``TABLE_FORMATS`` and ``LINEAR_FORMATS`` are how stored tensors become modules.
"""

from typing import Annotated

from pydantic import Field

from compressors.dense import float16, static_int8
from compressors.dense.channels import Channels
from compressors.dense.float16 import Float16
from compressors.dense.magnitude import Magnitude
from compressors.dense.static_int8 import StaticInt8
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.formats import LinearFormat, TableFormat
from compressors.tables import bfloat16, float8_e4m3, rowwise_int2, rowwise_int4, rowwise_int8
from compressors.tables.bfloat16 import BFloat16
from compressors.tables.float8_e4m3 import Float8E4M3
from compressors.tables.rowwise_int2 import RowwiseInt2
from compressors.tables.rowwise_int4 import RowwiseInt4
from compressors.tables.rowwise_int8 import RowwiseInt8

AnyStep = Annotated[
    Magnitude
    | Channels
    | Distill
    | FineTune
    | RowwiseInt8
    | RowwiseInt4
    | RowwiseInt2
    | Float8E4M3
    | BFloat16
    | StaticInt8
    | Float16,
    Field(discriminator="kind"),
]

TABLE_FORMATS: dict[str, TableFormat] = {
    form.name: form
    for form in (
        rowwise_int8.FORMAT,
        rowwise_int4.FORMAT,
        rowwise_int2.FORMAT,
        float8_e4m3.FORMAT,
        bfloat16.FORMAT,
        float16.TABLE_FORMAT,
    )
}
LINEAR_FORMATS: dict[str, LinearFormat] = {
    form.name: form for form in (static_int8.FORMAT, float16.LINEAR_FORMAT)
}
