"""Check that the default test tier detects every seeded fault: ``python -m tests.seeded_faults``.

A seeded fault is a small change of the code that a test must detect. The default test tier is what
``make test`` runs. Each fault is applied in a temporary copy of the repository. Exit code 0: all
faults were caught. Exit code 1: a fault was not detected or could not be applied, its tests could
not run, or the tests fail on unchanged code.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from tests.seeded_faults import FAULTS
from tests.seeded_faults.fault import Fault
from tests.seeded_faults.runner import (
    CAUGHT,
    ERROR,
    Outcome,
    check_fault,
    check_unpatched,
)


def print_line(outcome: Outcome) -> None:
    """Print the outcome of a fault."""
    first = outcome.failed[0] if outcome.failed else outcome.fault.effect
    more = f" (+{len(outcome.failed) - 1})" if len(outcome.failed) > 1 else ""
    print(
        f"{outcome.fault.id:44} {outcome.status:15} {outcome.seconds:6.1f} s "
        f"{outcome.cpu_seconds:6.1f} s CPU  {first}{more}",
        flush=True,
    )
    if outcome.detail:
        print(outcome.detail, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check faults and print a table; return the exit code."""
    parser = argparse.ArgumentParser("python -m tests.seeded_faults", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ID", help="check these faults only")
    parser.add_argument("--jobs", type=int, default=1, help="faults checked at the same time")
    parser.add_argument("--list", action="store_true", help="print the faults and check nothing")
    parser.add_argument(
        "--skip-unpatched", action="store_true", help="do not run the tests on unchanged code first"
    )
    options = parser.parse_args(arguments)
    faults = selected_faults(options.only, parser)
    if options.list:
        for fault in faults:
            print(f"{fault.id:44} {fault.file}: {fault.effect}")
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}  # inherited by the test processes
    if not options.skip_unpatched:
        unpatched = check_unpatched(faults)
        print(
            f"Without a fault: exit code {unpatched.exit_code}, {unpatched.seconds:.0f} s, "
            f"{unpatched.cpu_seconds:.0f} s of CPU time"
        )
        if unpatched.exit_code:
            print(unpatched.output)
            return 1
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for finished in as_completed([pool.submit(check_fault, fault) for fault in faults]):
            outcomes.append(finished.result())
            print_line(outcomes[-1])
    counts = Counter(outcome.status for outcome in outcomes)
    cpu = sum(outcome.cpu_seconds for outcome in outcomes)
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    print(f"{len(outcomes)} faults: {summary}; {cpu:.0f} s of CPU time")
    for outcome in outcomes:
        if outcome.status not in (CAUGHT, ERROR):  # errors were printed with their details
            print(f"{outcome.status}: {outcome.fault.id}: {outcome.fault.effect}")
    return 0 if set(counts) == {CAUGHT} else 1


def selected_faults(
    only: Sequence[str] | None, parser: argparse.ArgumentParser
) -> tuple[Fault, ...]:
    """Return the faults with these ids, or all; exit with code 2 if an id is unknown."""
    if only is None:
        return FAULTS
    by_id = {fault.id: fault for fault in FAULTS}
    if unknown := [name for name in only if name not in by_id]:
        parser.error(f"Unknown fault ids: {', '.join(unknown)}. --list prints the ids.")
    return tuple(by_id[name] for name in only)


if __name__ == "__main__":
    sys.exit(main())
