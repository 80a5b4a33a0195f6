"""Format the outcomes of faults as a table, which is printed at the end of a run.

A fault is one disturbance that a test causes: a killed process, a flipped bit, a failed request, a
hostile input, a concurrent command. Its outcome is a text that says what the commands then did,
such as ``same result`` or ``refused``; an outcome ``wrong`` or ``failed`` also fails the test. A
suite is one test file, and a case is the operation or the kind of file that the fault disturbs.

A row of the table: ``| kills | bundle pack | 109 | same result 109 |``.
"""

from collections import Counter
from collections.abc import Callable, Mapping

OUTCOME = "fault outcome"
"""Name of the pytest property with suite, case, outcome and number."""
CountOutcome = Callable[..., None]
"""Type of the fixture ``count_outcome``, which counts ``(suite, case, outcome, number=1)``."""


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
