"""Estimate the peak memory of an order from sizes alone. No Prefect.

An order has phases, such as lowering and training. The estimate of a phase is the memory of the
process without data (libraries and their buffers), plus a factor times the bytes of the weights or
of the data; the peak is the largest of these sums. Weights are memory-mapped files, so the factors
count copies of them: copies by the exporter and by ONNX Runtime, and compressed tables before they
are written.
"""

from compressors.contracts import Frozen
from compressors.lower.export import EXTERNAL_BYTES

MIB = 2**20
# Measured with the versions of constraints.txt: python -m benchmarks.peak_memory
PROCESS_BYTES = {
    "lowering the untouched model": 830 * MIB,
    "lowering the compressed model": 920 * MIB,
    "packing": 920 * MIB,
    "training": 920 * MIB,
    "reading the rows": 920 * MIB,
    "measuring": 1020 * MIB,
    "publishing": 1040 * MIB,
}
"""Bytes of the process in each phase; they grow, since libraries are imported on first use."""
BUILDER_BYTES = 300 * MIB
"""Additional bytes of the process if an engine is built."""
LOWERING_FACTOR = 3.5
"""Factor of the untouched model's weights while it is lowered, if its graph contains them."""
LOWERING_COMPRESSED_FACTOR = 4.6
"""The same factor of the compressed model: to audit a graph, ONNX Runtime copies its tensors."""
MEASURING_FACTOR = 4.1
"""Factor of the untouched model's weights while it is measured, if its graph contains them."""
LINKED_FACTOR = 1.2
"""Replaces the factors of lowering, measuring and publishing for the untouched model if its graph
links to the weight files of the bundle: ONNX Runtime then memory-maps these files.

This is the case for graphs that are served without building an engine and are larger than
``EXTERNAL_BYTES`` (``compressors/lower/export.py``).
"""
LINKED_COMPRESSED_FACTOR = 2.4
"""Replaces ``LOWERING_COMPRESSED_FACTOR`` for a compressed model with such a graph."""
PACKING_FACTOR = 1.5
"""Factor of the compressed model's weights while they are packed.

To pack is to encode tables in a smaller format and to write them; no bundle is packed here.
"""
PUBLISHING_FACTOR = 2.0
"""Factor of the untouched model's weights while the release is published."""
READING_FACTOR = 6.2
"""Factor of the largest split's parquet file while its rows are read."""
TRAINING_FACTOR = 8.8
"""Factor of the weights that a step trains, including these weights themselves.

The estimate adds one copy less, because the bytes of the untouched model already contain one.
"""


class Memory(Frozen):
    """An estimate of the largest resident set of the flow's process, in bytes.

    It includes pages of memory-mapped files, which the system can reclaim, so a machine with less
    memory may be sufficient.

    Attributes:
        peak: the sum of the next three fields.
        process: the process without data.
        weights: weights and copies of them.
        rows: rows of the data.
        moment: the phase of the peak, such as "training".
    """

    peak: int
    process: int
    weights: int
    rows: int
    moment: str


def peak_memory(
    *,
    bytes_before: int,
    bytes_after: int,
    data_bytes: int,
    builds: bool,
    trained_bytes: int = 0,
) -> Memory:
    """Estimate the peak memory of an order.

    Args:
        bytes_before: bytes of the untouched model's weights.
        bytes_after: bytes of the compressed model's weights.
        data_bytes: bytes of the largest split's parquet file.
        builds: whether an engine is built.
        trained_bytes: bytes of the tensors that a step trains. In memory at once are these tensors,
            their gradients, Adam's two moments and copies of the best epoch.
    """
    is_linked = bytes_before > EXTERNAL_BYTES and not builds
    is_compressed_linked = bytes_after > EXTERNAL_BYTES and not builds
    weights_and_rows = {
        "lowering the untouched model": (
            (LINKED_FACTOR if is_linked else LOWERING_FACTOR) * bytes_before,
            0,
        ),
        "lowering the compressed model": (
            (LINKED_COMPRESSED_FACTOR if is_compressed_linked else LOWERING_COMPRESSED_FACTOR)
            * bytes_after,
            0,
        ),
        "packing": (PACKING_FACTOR * bytes_after, 0),
        "training": (
            bytes_before + (TRAINING_FACTOR - 1) * trained_bytes if trained_bytes else 0,
            0,
        ),
        "reading the rows": (0, READING_FACTOR * data_bytes),
        "measuring": ((LINKED_FACTOR if is_linked else MEASURING_FACTOR) * bytes_before, 0),
        "publishing": ((LINKED_FACTOR if is_linked else PUBLISHING_FACTOR) * bytes_before, 0),
    }
    phase, (weights, rows) = max(
        weights_and_rows.items(), key=lambda item: PROCESS_BYTES[item[0]] + sum(item[1])
    )
    weights, rows = round(weights), round(rows)
    process = PROCESS_BYTES[phase] + (BUILDER_BYTES if builds else 0)
    return Memory(
        peak=process + weights + rows, process=process, weights=weights, rows=rows, moment=phase
    )
