"""How fast are tables encoded in memory, and how much is lost?

float32 rows to 8 and 4 bits, against torch's own prepack (asymmetric, min-max) and against a plain
copy of the same bytes into memory that is there already. Best of several rounds, in turn, so that
what slows the machine slows all; by the clock and by the processors' time, which others on the same
machine disturb less. Then the squared error of 4-bit tables drawn from five distributions.

    python -m benchmarks.table_encode [--rows 1000000] [--dim 64] [--threads 2]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from compressors.core.runner import BLOCK_ROWS
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

ROUNDS = 15
INT8 = RowwiseInt8()
FAST4 = RowwiseInt4(symmetric=False)
CLIPPED4 = RowwiseInt4(symmetric=False, clipping="least_squares")
SYMMETRIC4 = RowwiseInt4(clipping="least_squares")
SLOW4 = {clip: RowwiseInt4(symmetric=False, clipping=clip) for clip in ("greedy", "mse")}
ERROR_ROWS, ERROR_DIMS = 2000, (8, 16, 64, 128)


def encode(step: RowwiseInt8 | RowwiseInt4, rows: Tensor) -> None:
    """A whole table block by block, as a recipe's step does it, into memory taken for it."""
    layout = step.storage.layout(len(rows), rows.shape[1], step.settings())
    stored = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    for begin in range(0, len(rows), BLOCK_ROWS):
        for name, values in step.encode(rows[begin : begin + BLOCK_ROWS], {}).items():
            stored[name][begin : begin + BLOCK_ROWS] = values


def prepacked(rows: Tensor) -> Tensor:
    """What torch's 4-bit prepack makes of a table."""
    packed = torch.ops.quantized.embedding_bag_4bit_prepack(rows)
    found: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(packed)
    return found[:, : rows.shape[1]]


def decoded(step: RowwiseInt4, rows: Tensor) -> Tensor:
    """What a step makes of it."""
    ids = torch.arange(len(rows))
    return step.storage.lookup(step.encode(rows, {}), ids, rows.shape[1], step.settings())


def speeds(rows: Tensor) -> None:
    """GB of float32 a second, and ratios to the peers of this run."""
    room = torch.empty_like(rows)
    whole: dict[str, Callable[[], object]] = {
        "plain copy": lambda: room.copy_(rows),
        "torch 8-bit prepack": lambda: torch.ops.quantized.embedding_bag_byte_prepack(rows),
        "int8": lambda: INT8.encode(rows, {}),
        "int8, block by block": lambda: encode(INT8, rows),
        "torch 4-bit prepack": lambda: torch.ops.quantized.embedding_bag_4bit_prepack(rows),
        "int4 asymmetric, min_max": lambda: FAST4.encode(rows, {}),
        "int4 asymmetric, least_squares": lambda: CLIPPED4.encode(rows, {}),
        "int4 asymmetric, least_squares, block by block": lambda: encode(CLIPPED4, rows),
        "int4 symmetric, least_squares": lambda: SYMMETRIC4.encode(rows, {}),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in whole}
    for _ in range(ROUNDS + 1):  # the first round compiles, and touches every page
        for name, work in whole.items():
            begun = time.perf_counter(), time.process_time()
            work()
            taken[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    clock = {name: min(each[0] for each in rounds[1:]) for name, rounds in taken.items()}
    busy = {name: min(each[1] for each in rounds[1:]) for name, rounds in taken.items()}
    copy = "plain copy"
    print("| what | GB/s | prepack's time over its own | of a copy's speed |", end="")
    print(" GB per processor second | prepack's over its own | of a copy's |")
    print("|---|---|---|---|---|---|---|")
    for name in whole:
        peer = f"torch {8 if '8' in name else 4}-bit prepack"
        cells = [
            f"{rows.nbytes / best[name] / 1e9:.2f} | {best[peer] / best[name]:.2f} | "
            f"{best[copy] / best[name]:.0%}"
            for best in (clock, busy)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def errors() -> None:
    """Squared error of 4-bit rows, as a share of what torch's prepack loses."""
    generator = torch.Generator().manual_seed(0)
    print("\n| table | dim | min_max | least_squares | greedy | mse |")
    print("|---|---|---|---|---|---|")
    for dim in ERROR_DIMS:
        normal = torch.randn(ERROR_ROWS, dim, generator=generator)
        uniform = torch.rand(ERROR_ROWS, dim, generator=generator)
        laplace = torch.empty(ERROR_ROWS, dim).exponential_(generator=generator) * normal.sign()
        tail = normal / uniform.clamp(min=0.05).sqrt()
        drawn = {
            "normal": normal,
            "uniform": uniform - 0.5,
            "laplace": laplace,
            "log-normal": normal.exp(),
            "heavy tails": tail,
        }
        for name, rows in drawn.items():
            lost = float((prepacked(rows) - rows).square().sum())
            shares = [
                float((decoded(step, rows) - rows).square().sum()) / lost
                for step in (FAST4, CLIPPED4, *SLOW4.values())
            ]
            print(f"| {name} | {dim} | {' | '.join(f'{share:.3f}' for share in shares)} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = torch.randn(given.rows, given.dim, generator=torch.Generator().manual_seed(0))
    print(f"{given.rows:,} x {given.dim} float32, {given.threads} threads\n")
    speeds(rows)
    errors()


if __name__ == "__main__":
    main()
