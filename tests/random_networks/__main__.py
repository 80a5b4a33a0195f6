"""Run random networks, reproduce one failure and shrink it.

``python -m tests.random_networks --first 0 --count 300`` checks 300 networks and prints the
findings. ``--seed 17 --step rowwise_int4 --target tensorrt --shrink`` applies one step to the
network of one seed, lowers it for one target, and prints the smallest network that still fails.

A refusal is an error of one of recpress's classes, which is a correct result. A fault is a wrong
result (``check.py``). The dicts of steps are those of ``steps.py``: formats of tables (``TABLES``)
and layers (``LAYERS``), steps that change values (``VALUES``), and steps applied last (``LAST``).
"""

import argparse
import json
import logging
import random
import sys
import time

import torch

from tests.cached_onnx_operators import cache_onnx_operators
from tests.random_networks.check import Checker, Fault, Findings, run_check
from tests.random_networks.generator import Case, generate
from tests.random_networks.passes import PASSES
from tests.random_networks.shrink import shrink_case
from tests.random_networks.steps import LAST, LAYERS, TABLES, TARGETS, VALUES


def run_one_step(checker: Checker, kind: str | None, target: str | None) -> None:
    """Apply one step to all units that it accepts, then lower for one target.

    Without a step, the uncompressed network is lowered. Without a target, nothing is lowered.
    """
    rng = random.Random(checker.case.seed)
    # TABLES and LAYERS draw steps for units with given names; VALUES and LAST need no names.
    model = checker.source
    if kind is not None:
        step = (
            {**TABLES, **LAYERS}[kind](rng, ("*",))
            if kind in {**TABLES, **LAYERS}
            else {**VALUES, **LAST}[kind](rng)
        )
        result = checker.apply_step(step, model)
        if result is None:
            return
        if kind in {**TABLES, **LAYERS}:
            checker.check_module(result, model, kind)
        model = result
    if target is not None:
        checker.check_lowering(model, target, kind or "plain")


def main() -> int:
    """Parse the command line and run the checks; return 1 if there are faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_networks")
    parser.add_argument("--seed", type=int, help="check the network of one seed")
    parser.add_argument("--first", type=int, default=0, help="first seed of a range")
    parser.add_argument("--count", type=int, default=300, help="number of seeds")
    parser.add_argument(
        "--step",
        choices=sorted({**TABLES, **LAYERS, **VALUES, **LAST}),
        help="apply only this step, with random settings",
    )
    parser.add_argument("--target", choices=TARGETS, help="lower only for this target")
    parser.add_argument(
        "--pass",
        dest="name",
        choices=sorted(PASSES),
        default="whole",
        # The choices are the keys of ``PASSES``; "whole" is the one of the nightly tier.
        help="checks of a network without --step and --target (default: those of the nightly tier)",
    )
    parser.add_argument("--shrink", action="store_true", help="print the smallest failing network")
    parser.add_argument("--refusals", action="store_true", help="print every refusal")
    parser.add_argument("--progress", action="store_true", help="print a line for each seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # torch.export warns about every dimension

    def check(checker: Checker) -> None:
        if options.step or options.target:
            run_one_step(checker, options.step, options.target)
        else:
            PASSES[options.name](checker)

    first, count = (options.seed, 1) if options.seed is not None else (options.first, options.count)
    total, start = Findings(), time.process_time()
    with cache_onnx_operators():
        for seed in range(first, first + count):
            findings = run_check(generate(seed), check)
            total.add(findings)
            if options.progress:
                print(f"seed {seed}: {dict(findings.counts)}", flush=True)  # noqa: T201
            show(findings.faults)
            if options.refusals:
                show(findings.refused)
    summarize(total, time.process_time() - start)
    if options.shrink and total.faults:
        with cache_onnx_operators():
            shrink(generate(total.faults[0].seed), check, total.faults[0])
    return 1 if total.faults else 0


def show(faults: list[Fault]) -> None:
    """Print one line per fault or refusal."""
    for fault in faults:
        print(fault.line(), flush=True)  # noqa: T201


def summarize(total: Findings, seconds: float) -> None:
    """Print the numbers of checks, of lowered units by format and target, and of refusals."""
    print(f"\n{len(total.faults)} faults in {seconds:.0f} CPU seconds")  # noqa: T201
    for name, number in sorted(total.counts.items()):
        print(f"{number:7} {name}")  # noqa: T201
    print("lowered, by format and target:")  # noqa: T201
    for name, number in sorted(total.pairs.items()):
        print(f"{number:7} {name}")  # noqa: T201
    print("refusals:")  # noqa: T201
    for name, number in total.refusals.most_common():
        print(f"{number:7} {name}")  # noqa: T201


def shrink(case: Case, check: object, fault: Fault) -> None:
    """Print the smallest network with a fault of the same kind."""

    def fails(candidate: Case) -> bool:
        findings = run_check(candidate, check)  # type: ignore[arg-type]
        return any(other.kind == fault.kind for other in findings.faults)

    small = shrink_case(case, fails)
    print(json.dumps(small.config, indent=1))  # noqa: T201
    print(small.signature.model_dump_json(indent=1, exclude_defaults=True))  # noqa: T201
    show(run_check(small, check).faults)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
