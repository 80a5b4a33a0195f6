"""How fast are tables encoded in memory, and how large is the error?

The first printed table has the speed of encoding float32 rows in 8 and 4 bits. For comparison, it
has torch's prepack operators, which are asymmetric with min-max ranges, and a plain copy of the
float32 rows into memory that is already allocated. Encoders run in turn in every round, so that
other load affects all of them. Speeds are those of the fastest round, by wall time and by processor
time; other load affects processor time less.

The second printed table has the squared error of 4-bit tables whose weights are drawn from five
distributions, as a share of the error of torch's 4-bit prepack. Its columns are clipping rules: how
the quantization range of a row is chosen (``compressors/quantize/kernels/clipping.py``).

    python -m benchmarks.table_encode [--rows 1000000] [--dim 64] [--threads 2]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from compressors.core.steps.table_encoder import BLOCK_ROWS
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

ROUNDS = 15
INT8 = RowwiseInt8()
MIN_MAX_INT4 = RowwiseInt4(symmetric=False)
LEAST_SQUARES_INT4 = RowwiseInt4(symmetric=False, clipping="least_squares")
SYMMETRIC_INT4 = RowwiseInt4(clipping="least_squares")
SEARCHED_INT4 = tuple(RowwiseInt4(symmetric=False, clipping=rule) for rule in ("greedy", "mse"))
ERROR_ROWS, ERROR_DIMS = 2000, (8, 16, 64, 128)


def encode(step: RowwiseInt8 | RowwiseInt4, rows: Tensor) -> None:
    """Encode a table block by block into newly allocated memory, as recipes do.

    The second argument of ``TableStep.encode``, tensors of the whole table, is empty: row-wise
    formats have none.
    """
    layout = step.storage.layout(len(rows), rows.shape[1], step.settings())
    stored = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    for start in range(0, len(rows), BLOCK_ROWS):
        for name, values in step.encode(rows[start : start + BLOCK_ROWS], {}).items():
            stored[name][start : start + BLOCK_ROWS] = values


def run_prepack_round_trip(rows: Tensor) -> Tensor:
    """Return the table after torch's 4-bit prepack and unpack."""
    packed = torch.ops.quantized.embedding_bag_4bit_prepack(rows)
    unpacked: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(packed)
    return unpacked[:, : rows.shape[1]]


def run_round_trip(step: RowwiseInt4, rows: Tensor) -> Tensor:
    """Return the table after encoding and decoding by ``step``."""
    ids = torch.arange(len(rows))
    return step.storage.lookup(step.encode(rows, {}), ids, rows.shape[1], step.settings())


def print_speeds(rows: Tensor) -> None:
    """Print GB of encoded float32 rows per second, and ratios to prepack and to a plain copy."""
    destination = torch.empty_like(rows)
    encoders: dict[str, Callable[[], object]] = {
        "plain copy": lambda: destination.copy_(rows),
        "torch 8-bit prepack": lambda: torch.ops.quantized.embedding_bag_byte_prepack(rows),
        "int8": lambda: INT8.encode(rows, {}),
        "int8, block by block": lambda: encode(INT8, rows),
        "torch 4-bit prepack": lambda: torch.ops.quantized.embedding_bag_4bit_prepack(rows),
        "int4 asymmetric, min_max": lambda: MIN_MAX_INT4.encode(rows, {}),
        "int4 asymmetric, least_squares": lambda: LEAST_SQUARES_INT4.encode(rows, {}),
        "int4 asymmetric, least_squares, block by block": lambda: encode(LEAST_SQUARES_INT4, rows),
        "int4 symmetric, least_squares": lambda: SYMMETRIC_INT4.encode(rows, {}),
    }
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in encoders}
    for _ in range(ROUNDS + 1):  # the first round compiles kernels and touches all memory pages
        for name, encode_all in encoders.items():
            wall_start, processor_start = time.perf_counter(), time.process_time()
            encode_all()
            wall = time.perf_counter() - wall_start
            timings[name].append((wall, time.process_time() - processor_start))
    wall_seconds = {name: min(each[0] for each in rounds[1:]) for name, rounds in timings.items()}
    processor_seconds = {
        name: min(each[1] for each in rounds[1:]) for name, rounds in timings.items()
    }
    copy = "plain copy"
    print("| encoder | GB/s | speed / prepack | speed / copy |", end="")
    print(" GB per processor second | speed / prepack | speed / copy |")
    print("|---|---|---|---|---|---|---|")
    for name in encoders:
        peer = f"torch {8 if '8' in name else 4}-bit prepack"
        cells = [
            f"{rows.nbytes / best[name] / 1e9:.2f} | {best[peer] / best[name]:.2f} | "
            f"{best[copy] / best[name]:.0%}"
            for best in (wall_seconds, processor_seconds)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def print_errors() -> None:
    """Print the squared error of 4-bit rows as a share of the error of torch's prepack."""
    generator = torch.Generator().manual_seed(0)
    print("\n| table | dim | min_max | least_squares | greedy | mse |")
    print("|---|---|---|---|---|---|")
    for dim in ERROR_DIMS:
        normal = torch.randn(ERROR_ROWS, dim, generator=generator)
        uniform = torch.rand(ERROR_ROWS, dim, generator=generator)
        laplace = torch.empty(ERROR_ROWS, dim).exponential_(generator=generator) * normal.sign()
        tail = normal / uniform.clamp(min=0.05).sqrt()
        tables = {
            "normal": normal,
            "uniform": uniform - 0.5,
            "laplace": laplace,
            "log-normal": normal.exp(),
            "heavy tails": tail,
        }
        for name, rows in tables.items():
            peer_error = float((run_prepack_round_trip(rows) - rows).square().sum())
            shares = [
                float((run_round_trip(step, rows) - rows).square().sum()) / peer_error
                for step in (MIN_MAX_INT4, LEAST_SQUARES_INT4, *SEARCHED_INT4)
            ]
            print(f"| {name} | {dim} | {' | '.join(f'{share:.3f}' for share in shares)} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = torch.randn(args.rows, args.dim, generator=torch.Generator().manual_seed(0))
    print(f"{args.rows:,} x {args.dim} float32, {args.threads} threads\n")
    print_speeds(rows)
    print_errors()


if __name__ == "__main__":
    main()
