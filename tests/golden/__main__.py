"""Rewrite the golden record, or a part of it.

A case is a reference network and the compression steps that are applied to it. The record has a
line for each stored tensor, score and graph that the code computed for each case; the golden test
compares the current code with it. See ``cases.py`` and ``entries.py``.

``PYTHONPATH=tests python -m tests.golden`` records all cases. ``--only mixed`` rewrites the cases
whose ``name | network`` contains "mixed" and leaves the others unchanged; it requires the CPU and
the library versions of the record. A commit that changes the record lists each change and its
reason in its message.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.cached_onnx_operators import cache_onnx_operators
from tests.golden import compare, package
from tests.golden.cases import list_all_cases
from tests.golden.entries import Entries, compute_entries
from tests.golden.numerics import describe_machine


def main() -> int:
    """Record the cases and write the file; return 1 if the machine is not the record's."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("--only", default="", help="rewrite cases whose name contains this text")
    parser.add_argument("--out", type=Path, default=compare.RECORD, help="the file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # torch.export warns about every dimension
    entries: Entries = {}
    if options.only:
        recorded_on, entries = compare.read()
        if recorded_on != describe_machine():
            sys.stderr.write(
                f"Expected the record's machine {recorded_on}, got {describe_machine()}.\n"
            )
            return 1
    with cache_onnx_operators():
        for case in list_all_cases():
            title = f"{case.name} | {case.network}"
            if options.only not in title:
                continue
            start = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                case_entries = compute_entries(case, Path(folder), tuple(package.list_targets()))
            entries = {
                k: v for k, v in entries.items() if not k.startswith(f"{title} | ")
            } | case_entries
            sys.stderr.write(
                f"{title}: {len(case_entries)} in {time.process_time() - start:.1f} s\n"
            )
    compare.write(describe_machine(), entries, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
