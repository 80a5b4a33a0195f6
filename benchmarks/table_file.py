"""How fast is a table quantized from file to file, and in how much memory?

Against ``cp`` of the input and the result, which reads and writes both, and of half of them, which
reads and writes as many bytes as quantizing does. Files are in the page cache, all in turn, each in
a process of its own, without its start-up. By the clock, and by the processors' time: quantizing
uses every core, ``cp`` one. Memory is the highest resident set above that before the first block.

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
STEPS = {
    "int8": ("rowwise_int8", "{}"),
    "int4": ("rowwise_int4", "{}"),
    "int4, least_squares": (
        "rowwise_int4",
        '{"symmetric": false, "clipping": "least_squares"}',
    ),
}
CODE = """
import json, sys, time
from pathlib import Path
import torch
from tasks.bundles.table_files import quantize, step_named

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

step = step_named(sys.argv[3], json.loads(sys.argv[4]))
step.encode(torch.ones(8, 8), {})  # what is compiled once is no part of it
Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
before, begun, busy = held("VmRSS"), time.perf_counter(), time.process_time()
quantize(Path(sys.argv[1]), Path(sys.argv[2]), step)
seconds = time.perf_counter() - begun, time.process_time() - busy
print(json.dumps([*seconds, held("VmHWM") - before]))
"""


def quantized(source: Path, into: Path, kind: str, settings: str) -> tuple[float, float, int]:
    """Seconds by the clock and of processors, and bytes of memory above what the libraries take."""
    shutil.rmtree(into, ignore_errors=True)
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(source), str(into), kind, settings],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, busy, memory = json.loads(ended.stdout)
    return float(seconds), float(busy), int(memory)


def copied(files: list[Path], folder: Path) -> tuple[float, float]:
    """Seconds by the clock and of processors that ``cp`` takes for these files."""
    copy = shutil.which("cp")
    assert copy is not None
    seconds = 0.0
    before = os.times()
    for number, file in enumerate(files):
        target = folder / f"copy-{number}"
        target.unlink(missing_ok=True)
        begun = time.perf_counter()
        subprocess.run([copy, str(file), str(target)], check=True)
        seconds += time.perf_counter() - begun
        target.unlink()
    after = os.times()
    busy = after.children_user - before.children_user
    return seconds, busy + after.children_system - before.children_system


def first_half(source: Path, result: Path, folder: Path) -> Path:
    """A file of half the bytes of both."""
    path = folder / "half"
    wanted = (source.stat().st_size + result.stat().st_size) // 2
    with source.open("rb") as opened, path.open("wb") as made:
        while made.tell() < wanted:
            made.write(opened.read(min(2**24, wanted - made.tell())))
    return path


def main() -> None:
    """Print one line a method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="On which disk; else the temporary folder.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        source, into = folder / "in.safetensors", folder / "out"
        save_file({"t.weight": torch.randn(given.rows, given.dim)}, source)
        print(f"{given.rows:,} x {given.dim} float32, {len(os.sched_getaffinity(0))} cores\n")
        print("| what | s | of cp's speed | of cp of half | processor s | of cp | of half | MiB |")
        print("|---|---|---|---|---|---|---|---|")
        for name, (kind, settings) in STEPS.items():
            quantized(source, into, kind, settings)
            result = into / "files" / "model.safetensors"
            half = first_half(source, result, folder)
            ours, whole, less, memory = [], [], [], 0
            for _ in range(ROUNDS):
                *seconds, above = quantized(source, into, kind, settings)
                ours.append(seconds)
                memory = max(memory, above)
                whole.append(copied([source, result], folder))
                less.append(copied([half], folder))
            half.unlink()
            cells = []
            for place in range(2):  # by the clock, by processors
                best, copy, short = (
                    min(each[place] for each in all_) for all_ in (ours, whole, less)
                )
                cells.append(f"{best:.2f} | {copy / best:.0%} | {short / best:.0%}")
            print(f"| {name} | {' | '.join(cells)} | {memory / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    main()
