"""How many bytes does an order add to the store?

An order is a request to compress a model. The store contains bundles, the results of
tasks, and the served files.

Packs a click model with one large table, runs an order, and adds up the sizes of the files that the
order added to the store ("growth"). A file with several hard links counts once. Prints the sum next
to the size of the compressed bundle and of the served files (graphs and engines), and with
``--files`` every added file of 1 MB or more. The source is the packed bundle before compression.

    python -m benchmarks.store_bytes [--rows N ...] [--preset NAME] [--files]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peak_memory import DIM, Case, write

MEGABYTE = 10**6
LIMIT = "auc vs baseline >= -0.4"  # an order needs a limit; this one accepts every result


def list_files(store: Path) -> dict[int, tuple[int, str]]:
    """Return the size and one path of every file, by inode."""
    files: dict[int, tuple[int, str]] = {}
    # In reverse order, a blob (``blobs/...``) is listed before the hard links to it
    # (``artifacts/...``), so a file with several links is listed with its path as a blob.
    for path in sorted(store.rglob("*"), reverse=True):
        if path.is_file():
            files.setdefault(path.stat().st_ino, (path.stat().st_size, str(path)))
    return files


def run_recpress(environment: dict[str, str], *arguments: str) -> str:
    """Run a command of recpress and return its output."""
    command = [sys.executable, "-m", "flows.cli.app", *arguments]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def measure(rows: int, preset: str, *, shows_files: bool) -> str:
    """Pack and compress a model whose table has ``rows`` rows.

    Returns:
        The cells of a line of the printed table, joined by ``|``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "recpress"
        write(Path(scratch) / "draft", Case(rows=rows, hidden=32, train=20_000, preset=preset))
        environment = {
            **os.environ,
            "RECPRESS_HOME": str(home),
            "PREFECT_HOME": f"{scratch}/prefect",
            "RECPRESS_ALLOWED_MODULES": "benchmarks",
        }
        run_recpress(environment, "bundle", "pack", f"{scratch}/draft")
        before = list_files(home / "store")
        output = run_recpress(
            environment, "compress", "large@1", "--preset", preset, "--limit", LIMIT, "--json"
        )
        report = json.loads(output)["report"]
        added = {
            inode: file for inode, file in list_files(home / "store").items() if inode not in before
        }
    if shows_files:
        for size, path in sorted(added.values(), reverse=True):
            if size >= MEGABYTE:
                print(
                    f"{size / MEGABYTE:10,.1f} MB {Path(path).relative_to(home)}", file=sys.stderr
                )
    growth = sum(size for size, _ in added.values())
    source, compressed = report["source"]["bytes"], report["compressed"]["bytes"]
    served = sum(item["artifact"]["bytes"] for item in report["targets"] if item["artifact"])
    numbers = [rows * DIM * 4, source, growth, compressed, served]
    cells = [f"{number / MEGABYTE:,.1f}" for number in numbers]
    ratios = [growth / compressed, growth / (compressed + served)]
    return " | ".join([preset, *cells, *(f"{ratio:.2f}" for ratio in ratios)])


def main() -> None:
    """Print a Markdown table with one line per size of the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--files", action="store_true")
    args = parser.parse_args()
    print("| preset | table MB | source MB | growth MB | compressed bundle MB | served files MB | "
          "growth / bundle | growth / (bundle and served) |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for rows in args.rows:
        print(f"| {measure(rows, args.preset, shows_files=args.files)} |", flush=True)


if __name__ == "__main__":
    main()
