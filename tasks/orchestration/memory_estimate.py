"""How much memory carrying out an order takes at most, from sizes alone. No Prefect.

Weights lie in mapped files and are read through them, so what counts is what is copied: the
exporter's and ONNX Runtime's copies while the untouched model is lowered and looked at, which is
where every run so far was at its largest; and packed tables before they are written.
"""

from compressors.contracts import Frozen

MIB = 2**20
# Measured with the versions of constraints.txt: python -m benchmarks.peak_memory
PROCESS = {  # libraries are imported when they are first needed
    "lowering the untouched model": 830 * MIB,
    "packing": 920 * MIB,
    "training": 920 * MIB,
    "reading the rows": 920 * MIB,
    "measuring": 1020 * MIB,
    "publishing": 1040 * MIB,
}
BUILDER = 300 * MIB
LOWERING = 4.6
PACKING = 1.3
MEASURING = 4.1
PUBLISHING = 2.0
READING = 6.2
TRAINING = 8.8


class Memory(Frozen):
    """An estimate in bytes of the largest resident set of the flow's process.

    ``peak`` is the sum of the others. Pages of mapped files are counted, which the system can
    take back; so a smaller machine may still do.
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
    """Estimate the peak.

    Args:
        bytes_before: of the untouched model's weights.
        bytes_after: of the compressed model's.
        data_bytes: of the largest split's parquet file.
        builds: whether an engine is built.
        trained_bytes: of the tensors that a step trains: they, their gradients, Adam's two
            moments and the best epoch's copies are in memory at once.
    """
    moments = {
        "lowering the untouched model": (round(LOWERING * bytes_before), 0),
        "packing": (round(bytes_before + PACKING * bytes_after), 0),
        "training": (
            bytes_before + round((TRAINING - 1) * trained_bytes) if trained_bytes else 0,
            0,
        ),
        "reading the rows": (0, round(READING * data_bytes)),
        "measuring": (round(MEASURING * bytes_before), 0),
        "publishing": (round(PUBLISHING * bytes_before), 0),
    }
    moment, (weights, rows) = max(moments.items(), key=lambda item: PROCESS[item[0]] + sum(item[1]))
    process = PROCESS[moment] + (BUILDER if builds else 0)
    return Memory(
        peak=process + weights + rows, process=process, weights=weights, rows=rows, moment=moment
    )
