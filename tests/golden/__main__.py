"""Rewrite the golden record, or a part of it.

A case is a reference network and the compression steps that are applied to it. The record describes
the stored tensors, the scores and the graphs of each case, line by line. The golden test computes
the same lines with the current code and compares them. See ``cases.py`` and ``entries.py``.

``PYTHONPATH=tests python -m tests.golden`` records all cases. ``--only mixed`` rewrites the cases
whose title, ``name | network``, contains "mixed". It leaves the others unchanged, and requires the
CPU and the library versions of the record. If you commit a changed record, list
each change and its reason in the commit message.
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
    """Record the cases and write the file.

    With ``--only``, return 1 and write nothing if the machine is not that of the record.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("--only", default="", help="rewrite cases whose title contains this text")
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
            other_entries = {
                key: line for key, line in entries.items() if not key.startswith(f"{title} | ")
            }
            entries = other_entries | case_entries
            sys.stderr.write(
                f"{title}: {len(case_entries)} in {time.process_time() - start:.1f} s\n"
            )
    compare.write(describe_machine(), entries, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
