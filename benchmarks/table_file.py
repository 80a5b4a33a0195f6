"""How fast is a table quantized from file to file, and how much memory does it need?

Quantizing reads the input and writes the result. Its time is compared with two copies:

- ``cp`` of the input and the result, which reads and writes both files;
- ``cp`` of a file with half as many bytes, which reads and writes as many bytes in total as
  quantizing does.

All files are in the page cache. Each run is a separate process; runs of different kinds alternate,
and the start-up time of Python is excluded. Prints wall time and processor time, since quantizing
uses all cores and ``cp`` one. Memory is the peak resident set minus the resident set before the
first block.

    python -m benchmarks.table_file [--rows 4000000] [--dim 64] [--folder DIR]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROUNDS = 5
STEPS = {  # label -> kind of the step, and its settings as JSON
    "int8": ("rowwise_int8", "{}"),
    "int4": ("rowwise_int4", "{}"),
    "int4, least_squares": (
        "rowwise_int4",
        '{"symmetric": false, "clipping": "least_squares"}',
    ),
}
QUANTIZE_SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from tasks.bundles.table_files import quantize, build_table_step

def memory_bytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

step = build_table_step(sys.argv[3], json.loads(sys.argv[4]))
step.encode(torch.ones(8, 8), {})  # compile the kernels before the measurement
Path("/proc/self/clear_refs").write_text("5")  # reset the peak (VmHWM)
before = memory_bytes("VmRSS")
wall_start, processor_start = time.perf_counter(), time.process_time()
quantize(Path(sys.argv[1]), Path(sys.argv[2]), step)
seconds = time.perf_counter() - wall_start, time.process_time() - processor_start
print(json.dumps([*seconds, memory_bytes("VmHWM") - before]))
"""


def measure_quantize(
    source: Path, output_folder: Path, kind: str, settings: str
) -> tuple[float, float, int]:
    """Return wall seconds, processor seconds, and peak bytes of memory without the libraries."""
    shutil.rmtree(output_folder, ignore_errors=True)
    completed = subprocess.run(
        [sys.executable, "-c", QUANTIZE_SCRIPT, str(source), str(output_folder), kind, settings],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, processor_seconds, memory = json.loads(completed.stdout)
    return float(seconds), float(processor_seconds), int(memory)


def measure_copy(files: list[Path], folder: Path) -> tuple[float, float]:
    """Return the wall seconds and processor seconds of ``cp`` for these files."""
    copy = shutil.which("cp")
    assert copy is not None
    seconds = 0.0
    before = os.times()
    for number, file in enumerate(files):
        copied_file = folder / f"copy-{number}"
        copied_file.unlink(missing_ok=True)
        start = time.perf_counter()
        subprocess.run([copy, str(file), str(copied_file)], check=True)
        seconds += time.perf_counter() - start
        copied_file.unlink()
    after = os.times()
    user_seconds = after.children_user - before.children_user
    return seconds, user_seconds + after.children_system - before.children_system


def write_half(source: Path, result: Path, folder: Path) -> Path:
    """Write a file with half as many bytes as ``source`` and ``result`` have together."""
    path = folder / "half"
    size = (source.stat().st_size + result.stat().st_size) // 2
    with source.open("rb") as reader, path.open("wb") as writer:
        while writer.tell() < size:
            writer.write(reader.read(min(2**24, size - writer.tell())))
    return path


def main() -> None:
    """Print a Markdown table with one line per method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument(
        "--folder", type=Path, help="Folder for the files; default: the temporary folder."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        source, output_folder = folder / "in.safetensors", folder / "out"
        save_file({"t.weight": torch.randn(args.rows, args.dim)}, source)
        print(f"{args.rows:,} x {args.dim} float32, {len(os.sched_getaffinity(0))} cores\n")
        print("| format | s | speed / cp | speed / cp of half | ", end="")
        print("processor s | speed / cp | speed / cp of half | MiB |")
        print("|---|---|---|---|---|---|---|---|")
        for name, (kind, settings) in STEPS.items():
            measure_quantize(source, output_folder, kind, settings)
            result = output_folder / "files" / "model.safetensors"
            half = write_half(source, result, folder)
            quantize_runs, full_copies, half_copies, memory = [], [], [], 0
            for _ in range(ROUNDS):
                *seconds, run_memory = measure_quantize(source, output_folder, kind, settings)
                quantize_runs.append(seconds)
                memory = max(memory, run_memory)
                full_copies.append(measure_copy([source, result], folder))
                half_copies.append(measure_copy([half], folder))
            half.unlink()
            cells = []
            for column in range(2):  # wall time, processor time
                best, copy, half_copy = (
                    min(seconds[column] for seconds in rounds)
                    for rounds in (quantize_runs, full_copies, half_copies)
                )
                cells.append(f"{best:.2f} | {copy / best:.0%} | {half_copy / best:.0%}")
            print(f"| {name} | {' | '.join(cells)} | {memory / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
