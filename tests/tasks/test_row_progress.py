"""Log lines that show how many rows of a long task are done."""

import pytest

from tasks.orchestration import row_progress
from tasks.orchestration.row_progress import SECONDS_PER_LINE, RowProgress


def test_lines_are_at_least_seconds_per_line_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(row_progress.time, "monotonic", lambda: now)
    progress = RowProgress("encode items", 2_000)
    with caplog.at_level("INFO", row_progress.__name__):
        for done in range(0, 2_001, 100):  # 100 rows take a fifth of the time per line
            progress.show(done)
            now += SECONDS_PER_LINE / 5
    assert caplog.messages == [
        f"encode items: {done} of 2,000" for done in ("500", "1,000", "1,500", "2,000")
    ]
