"""Estimate the peak memory of an order from sizes alone. No Prefect.

Weights are read through memory-mapped files, so only copies count: the copies of the exporter and
of ONNX Runtime while the untouched model is lowered and inspected, which was the peak of every run
so far; and packed tables before they are written.
"""

from compressors.contracts import Frozen
from compressors.lower.export import EXTERNAL_BYTES

MIB = 2**20
# Measured with the versions of constraints.txt: python -m benchmarks.peak_memory
PROCESS = {  # libraries are imported on first use
    "lowering the untouched model": 830 * MIB,
    "packing": 920 * MIB,
    "training": 920 * MIB,
    "reading the rows": 920 * MIB,
    "measuring": 1020 * MIB,
    "publishing": 1040 * MIB,
}
BUILDER = 300 * MIB
LOWERING = 4.6
LINKED = 2.0
"""Instead of ``LOWERING`` and ``MEASURING``, if the graph has links to the bundle's tables: ONNX
Runtime maps these files. So it is for graphs of more bytes than ``EXTERNAL_BYTES`` that are served
as they are (``compressors.lower.export``)."""
PACKING = 1.3
MEASURING = 4.1
PUBLISHING = 2.0
READING = 6.2
TRAINING = 8.8


class Memory(Frozen):
    """An estimate in bytes of the largest resident set of the flow's process.

    ``peak`` is the sum of the other fields. It includes pages of mapped files, which the system can
    reclaim; so a machine with less memory may be sufficient.
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
    """Estimate the peak memory.

    Args:
        bytes_before: bytes of the untouched model's weights.
        bytes_after: bytes of the compressed model's weights.
        data_bytes: bytes of the largest split's parquet file.
        builds: whether an engine is built.
        trained_bytes: bytes of the tensors that a step trains; these tensors, their gradients,
            Adam's two moments and the best epoch's copies are in memory at once.
    """
    linked = bytes_before > EXTERNAL_BYTES and not builds
    moments = {
        "lowering the untouched model": (round((LINKED if linked else LOWERING) * bytes_before), 0),
        "packing": (round(bytes_before + PACKING * bytes_after), 0),
        "training": (
            bytes_before + round((TRAINING - 1) * trained_bytes) if trained_bytes else 0,
            0,
        ),
        "reading the rows": (0, round(READING * data_bytes)),
        "measuring": (round((LINKED if linked else MEASURING) * bytes_before), 0),
        "publishing": (round(PUBLISHING * bytes_before), 0),
    }
    moment, (weights, rows) = max(moments.items(), key=lambda item: PROCESS[item[0]] + sum(item[1]))
    process = PROCESS[moment] + (BUILDER if builds else 0)
    return Memory(
        peak=process + weights + rows, process=process, weights=weights, rows=rows, moment=moment
    )
