"""Sequence of plan lines in reports: ``largest_first``.

The largest table is the one with most bytes before compression.
"""

from compressors.contracts import PlanLine
from compressors.contracts.reasons import Reason
from tasks.report.cells import largest_first


def line(module: str, before: int) -> PlanLine:
    """A plan line of a table with these original bytes; 0 if a step created the table."""
    return PlanLine(
        module=module,
        role="table",
        format="x",
        bytes_before=before,
        bytes_after=1,
        reasons=(Reason("as_written", text="r"),),
    )


def test_largest_first_lists_composing_tables_after_their_table():
    """Composing tables are those that a step created to replace one table together."""
    lines = [
        line("small", 5),
        line("user", 50),
        line("user.hot", 0),
        line("user.cold", 0),
        line("user.cold.narrow", 0),
        line("large", 90),
        line("large.kept", 0),
        line("user.other", 7),  # not a part of "user", since it has original bytes
    ]
    assert [item.module for item in largest_first(lines)] == [
        "large",
        "large.kept",
        "user",
        "user.cold",
        "user.cold.narrow",
        "user.hot",
        "user.other",
        "small",
    ]
