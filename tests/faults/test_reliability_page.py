"""Compare the numbers in ``docs/reliability.md`` with the fault tests."""

from pathlib import Path

import hostile_drafts
import hostile_registry
import test_full_disk
import test_fuzz
import test_kills
import test_s3_faults
from parsers import PARSERS
from s3_proxy import FAULTS

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_reliability_page_states_the_sizes_of_the_fault_tests() -> None:
    page = PAGE.read_text()
    sizes = (
        f"{len(PARSERS)} parsers, {test_fuzz.INPUTS:,} inputs each",
        # A draft is the folder that becomes a bundle when it is packed.
        f"{len(hostile_drafts.CASES)} drafts",
        f"{len(hostile_registry.cases())} registry entries",
        f"{test_kills.RANDOM_TIMES} random times",
        # Pairs of kills: a run is killed, and so is the next run of the same command.
        f"{test_kills.TWICE} times twice in a row",
        f"{len(FAULTS)} kinds of fault",
        f"{len(test_full_disk.KILOBYTES)} sizes of disk",
        f"{len(test_s3_faults.ORDER_SEEDS)} whole orders",
    )
    assert [text for text in sizes if text not in page] == []


def test_reliability_page_names_every_suite_of_fault_tests() -> None:
    page = PAGE.read_text()
    suites = {
        path.stem.removeprefix("test_")
        for path in Path(__file__).parent.glob("test_*.py")
        if path.stem != "test_reliability_page"
    }
    assert [name for name in sorted(suites) if name not in page] == []
