"""Fuzz all parsers of untrusted bytes with mutated inputs.

Claim: a parser returns a result or raises one of this project's errors, within 5 s and 2 GiB.
There is no other exception, no crash of the process, and no message of more than 20,000 characters.

Enumeration: 10,000 inputs per parser in the tests with the marker ``nightly``, 12 in the other
test, with fixed seeds (see ``fuzzing`` and ``parsers``).

The outcome of an input is a text such as ``refused``; the fixture ``count_outcome`` counts
``(suite, case, outcome, number=1)``. A home is a folder with all files of one installation.
"""

from pathlib import Path
from typing import Any

import pytest
from forked import ForkServerClient
from homes import Home
from outcomes import CountOutcome
from parsers import PARSERS

SUITE = "fuzz"
INPUTS = 10_000  # per parser in the nightly tests
SAMPLE = 12  # per parser by default
SHARDS = 2  # nightly tests that share the inputs of one parser
MEMORY = 2 * 2**30
NIGHTLY_SECONDS = 3000.0


def fuzz(
    fork_server: ForkServerClient, home: Home, function: str, **arguments: object
) -> dict[str, Any]:
    """Call a function of ``fuzzing`` in a child process with limited memory; return its result.

    ``function`` is its module and name, such as ``fuzzing:run``.
    """
    completed = fork_server.call(
        function, arguments, variables=home.variables, memory=MEMORY, seconds=NIGHTLY_SECONDS
    )
    assert completed.value is not None, f"{arguments}: signal {completed.signal}: {completed.text}"
    return dict(completed.value)


def check(parser: str, result: dict[str, Any], count_outcome: CountOutcome) -> list[str]:
    """Count the outcomes of one parser; return its failures."""
    for outcome, number in result["outcomes"].items():
        count_outcome(SUITE, parser, outcome, number)
    return [f"{parser}: {failure}" for failure in result["failures"]]


def test_parsers_refuse_or_parse_a_few_changed_inputs(
    fork_server: ForkServerClient, tmp_path: Path, count_outcome: CountOutcome
) -> None:
    results = fuzz(fork_server, Home(tmp_path), "fuzzing:run_all", count=SAMPLE, seed=0)
    assert set(results) == set(PARSERS)
    failures = [
        line for parser in PARSERS for line in check(parser, results[parser], count_outcome)
    ]
    assert failures == [], "\n\n".join(failures)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(1, SHARDS + 1))
@pytest.mark.parametrize("parser", PARSERS)
def test_parser_refuses_or_parses_any_changed_input(
    parser: str,
    shard: int,
    fork_server: ForkServerClient,
    tmp_path: Path,
    count_outcome: CountOutcome,
) -> None:
    count = INPUTS // SHARDS
    result = fuzz(
        fork_server, Home(tmp_path), "fuzzing:run", parser=parser, count=count, seed=shard
    )
    assert check(parser, result, count_outcome) == [], "\n\n".join(result["failures"])
