"""Count the outcomes of faults and format them as a table at the end of a run."""

from collections import Counter
from collections.abc import Mapping

OUTCOME = "fault outcome"
"""Name of the pytest property with suite, case, outcome and number."""


def format_table(rows: Mapping[tuple[str, str, str], int]) -> list[str]:
    """Format the outcomes as the lines of a Markdown table.

    Args:
        rows: number of faults by suite, case and outcome.
    """
    cases: dict[tuple[str, str], Counter[str]] = {}
    for (suite, case, outcome), number in sorted(rows.items()):
        cases.setdefault((suite, case), Counter())[outcome] += number
    lines = ["| suite | case | faults | outcomes |", "|---|---|---|---|"]
    for (suite, case), counts in sorted(cases.items()):
        summary = ", ".join(f"{name} {number:,}" for name, number in counts.most_common())
        lines.append(f"| {suite} | {case} | {counts.total():,} | {summary} |")
    return lines
