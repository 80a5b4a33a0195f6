"""How the outcomes of single faults are counted and shown at the end of a run."""

from collections import Counter
from collections.abc import Mapping

OUTCOME = "fault outcome"


def table(rows: Mapping[tuple[str, str, str], int]) -> list[str]:
    """Lines of a Markdown table: suite, case, number of faults, outcomes with their numbers."""
    cases: dict[tuple[str, str], Counter[str]] = {}
    for (suite, case, outcome), number in sorted(rows.items()):
        cases.setdefault((suite, case), Counter())[outcome] += number
    lines = ["| suite | case | faults | outcomes |", "|---|---|---|---|"]
    for (suite, case), found in sorted(cases.items()):
        shown = ", ".join(f"{name} {number:,}" for name, number in found.most_common())
        lines.append(f"| {suite} | {case} | {found.total():,} | {shown} |")
    return lines
