"""Compression of a table of 17 GB with little memory, and with offsets beyond 32 bits.

The source is a sparse file: only the rows next to borders (``BORDERS``) are written. The others
read as zeros and take no space on disk.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compressors.core.modules.formats import TensorSpec
from compressors.core.state.safetensors_stream import StreamedFile, write_piece

ROOT = Path(__file__).parents[2]
DIM = 64
ROWS = 2**32 // DIM + 70_000  # 17.2 GB of float32, 4.3 GB of codes
BLOCK_ROWS = 50_000
CHUNK_BYTES = 8 * 2**20  # the result is hashed in chunks of this size

# Rows at which an offset exceeds 31 or 32 bits (in elements of the table, which are also bytes of
# int8 codes), or 31 to 34 bits (in bytes of float32), or at which the first or last block ends.
BORDERS = (
    *(2**power // DIM for power in (31, 32)),
    *(2**power // (4 * DIM) for power in (31, 32, 33, 34)),
    *(BLOCK_ROWS * block for block in (1, ROWS // BLOCK_ROWS)),
)
MAX_GROWTH_BYTES = 256 * 2**20  # of resident memory during quantization
MAX_DATA_BYTES = 3 * 2**29  # 1.5 GiB of private memory that the process may allocate

# Prints the resident memory before quantization, and its maximum.
CODE = """
import json, resource, sys
from pathlib import Path
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from tasks.bundles.table_files import quantize

def read_status_bytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # reset the maximum
before = read_status_bytes("VmRSS")
quantize(Path(sys.argv[1]), Path(sys.argv[2]), RowwiseInt8(), block_rows=int(sys.argv[4]))
print(json.dumps([before, read_status_bytes("VmHWM")]))
"""


def rows_at_borders(header: int) -> list[int]:
    """Return the rows next to every border, and next to the end of the chunk that contains it.

    Args:
        header: bytes before the codes in the result's file, which is hashed in chunks.
    """
    rows = {0, ROWS - 1}
    for border in BORDERS:
        byte = header + border * DIM
        chunk_end = (-(-byte // CHUNK_BYTES) * CHUNK_BYTES - header) // DIM
        for row in (border, chunk_end):
            rows |= {row - 1, row, row + 1}
    return sorted(row for row in rows if 0 <= row < ROWS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quantize_of_a_17_gb_table_is_correct_at_32_bit_borders_in_flat_memory(tmp_path: Path):
    source, into = tmp_path / "in.safetensors", tmp_path / "out"
    file = StreamedFile({"t.weight": TensorSpec((ROWS, DIM), torch.float32)})
    result = StreamedFile(
        {
            "t.codes": TensorSpec((ROWS, DIM), torch.int8),
            "t.scale": TensorSpec((ROWS, 1), torch.float16),
        }
    )
    rows = rows_at_borders(result.find_offset("t.codes"))
    with source.open("wb") as opened:
        opened.write(file.header)
        opened.truncate(file.bytes)
        opened.flush()
        for number, row in enumerate(rows, start=1):
            weight = torch.arange(DIM, dtype=torch.float32).sub(DIM // 2).mul(number).unsqueeze(0)
            write_piece(opened.fileno(), file.piece("t.weight", weight, row))
    try:
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                CODE,
                str(source),
                str(into),
                str(MAX_DATA_BYTES),
                str(BLOCK_ROWS),
            ],
            cwd=ROOT,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        before, highest = json.loads(process.stdout)
        print(f"{before / 2**20:.0f} MiB before, {highest / 2**20:.0f} MiB at most")  # noqa: T201
        assert highest - before <= MAX_GROWTH_BYTES
        with safe_open(into / "files" / "model.safetensors", framework="pt") as opened:
            scale = opened.get_tensor("t.scale")
            assert scale.shape == (ROWS, 1)
            # Rows of zeros have the smallest positive float16 as scale, 2^-24. Only the written
            # rows have a larger scale, so each of them was stored at its place.
            assert torch.nonzero(scale[:, 0] > 2.0**-24).flatten().tolist() == rows
            codes = opened.get_slice("t.codes")
            for number, row in enumerate(rows, start=1):
                decoded = codes[row : row + 1].float() * scale[row : row + 1].float()
                weight = torch.arange(DIM, dtype=torch.float32).sub(DIM // 2).mul(number)
                # Half the scale for rounding codes, and 2^-11 for rounding the scale to float16.
                limit = float(weight.abs().max()) * (0.5 / 127 + 2**-11)
                assert float((decoded[0] - weight).abs().max()) <= limit, row
                if row + 1 < ROWS and row + 1 not in rows:
                    assert not codes[row + 1 : row + 2].any(), row
    finally:
        source.unlink()
        for path in sorted(into.rglob("*.safetensors")):
            path.unlink()
