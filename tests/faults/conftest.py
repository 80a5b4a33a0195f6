"""Fixtures of the fault tests: servers, snapshots of homes, and the table of outcomes.

A home is a folder with all files of one recpress installation. A snapshot is a copy of a home. A
draft is the folder that a user writes and ``recpress bundle pack`` reads: ``model.json``, weights
and data. See ``outcomes.py`` for faults and outcomes.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drafts import write_draft
from forked import ForkServerClient, running_fork_server
from homes import ROWS, Home, environment, write_order
from outcomes import OUTCOME, CountOutcome, format_table

START_SECONDS = 120


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServerClient]:
    """The fork server, which runs commands in forks of a process with all libraries imported."""
    scratch = tmp_path_factory.mktemp("fork_server")
    with running_fork_server(environment(scratch), scratch / "children") as server:
        yield server


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a Prefect server that all orders of this process use."""
    home = tmp_path_factory.mktemp("prefect-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    variables = environment(home) | {"PREFECT_SERVER_LOGGING_LEVEL": "WARNING"}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Prefect server: {(home / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small draft for all orders."""
    return write_draft(tmp_path_factory.mktemp("draft") / "draft", rows=ROWS)


@pytest.fixture(scope="session")
def order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an order that promotes its result."""
    return write_order(tmp_path_factory.mktemp("order") / "order.json")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that contains the home and the snapshots of this process."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def empty_snapshot(fork_server: ForkServerClient, root: Path) -> Path:
    """A snapshot of a home with an empty registry."""
    home = Home(root / "home")
    completed = fork_server.run(["registry", "list"], variables=home.variables)
    assert completed.code == 0, completed.text
    return home.save_snapshot(root / "empty")


@pytest.fixture(scope="session")
def promoted_snapshot(fork_server: ForkServerClient, root: Path, empty_snapshot: Path) -> Path:
    """A snapshot with three published orders of model ``m``; two were promoted in sequence."""
    home = Home(root / "home")
    home.restore(empty_snapshot)
    arguments = {"folder": str(root / "reports"), "orders": list("abc"), "promoted": 2}
    completed = fork_server.call("homes:publish_orders", arguments, variables=home.variables)
    assert completed.value == ["1", "2", "3"], completed.text
    return home.save_snapshot(root / "promoted")


@pytest.fixture(scope="session")
def packed_snapshot(
    fork_server: ForkServerClient, root: Path, empty_snapshot: Path, draft: Path
) -> Path:
    """A snapshot with the packed draft and an empty registry."""
    home = Home(root / "home")
    home.restore(empty_snapshot)
    completed = fork_server.run(["bundle", "pack", str(draft)], variables=home.variables)
    assert completed.code == 0, completed.text
    return home.save_snapshot(root / "packed")


@pytest.fixture(scope="session")
def order_variables(prefect_url: str) -> dict[str, str]:
    """Additional environment variables of commands that run an order."""
    return {"PREFECT_API_URL": prefect_url}


@pytest.fixture(scope="session")
def preloaded_fork_server(
    fork_server: ForkServerClient,
    root: Path,
    packed_snapshot: Path,
    order: Path,
    order_variables: dict[str, str],
) -> ForkServerClient:
    """``fork_server`` after it has also imported the modules that commands with an order import."""
    home = Home(root / "home")
    for _ in range(2):
        home.restore(packed_snapshot)
        completed = fork_server.run_and_preload(
            ["compress", "--order", str(order)], variables=home.variables | order_variables
        )
        assert completed.code == 0, completed.text
    return fork_server


@pytest.fixture(scope="session")
def finished_snapshot(
    preloaded_fork_server: ForkServerClient,
    root: Path,
    packed_snapshot: Path,
    order: Path,
    order_variables: dict[str, str],
) -> Path:
    """A snapshot after one complete order, which promoted its result."""
    home = Home(root / "home")
    home.restore(packed_snapshot)
    completed = preloaded_fork_server.run(
        ["compress", "--order", str(order)], variables=home.variables | order_variables
    )
    assert completed.code == 0, completed.text
    return home.save_snapshot(root / "finished")


@pytest.fixture
def count_outcome(request: pytest.FixtureRequest) -> Iterator[CountOutcome]:
    """A function that counts outcomes of faults: ``count_outcome(suite, case, outcome, number=1)``.

    ``number`` is the number of faults with this outcome; see ``outcomes.py``.
    """
    counts: Counter[tuple[str, str, str]] = Counter()

    def count(suite: str, case: str, outcome: str, number: int = 1) -> None:
        counts[suite, case, outcome] += number

    yield count
    for key, number in counts.items():
        request.node.user_properties.append((OUTCOME, [*key, number]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of faults and outcomes; write it to ``RECPRESS_FAULTS_JSON`` if set."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == OUTCOME and getattr(report, "when", "") == "teardown":
                    suite, case, outcome, number = value
                    rows[suite, case, outcome] += number
    if not rows:
        return
    terminalreporter.section("faults")
    for line in format_table(rows):
        terminalreporter.write_line(line)
    if file := os.environ.get("RECPRESS_FAULTS_JSON"):
        lines = [
            {"suite": suite, "case": case, "outcome": outcome, "count": count}
            for (suite, case, outcome), count in sorted(rows.items())
        ]
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(lines, indent=1) + "\n")


def _is_healthy(url: str) -> bool:
    """Return whether the Prefect server responds."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
