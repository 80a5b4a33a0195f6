"""What every test starts from: an empty environment and a home of its own."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from onnx_operators import operators_read_once
from s3_server import S3Server, running_server
from xdist.scheduler import LoadScopeScheduling

from infra.telemetry import disable_telemetry

PLACES = {"RECPRESS_STORE", "RECPRESS_TRITON", "MLFLOW_TRACKING_URI"}

disable_telemetry()

# Prefect reads this when it is imported, which is before any fixture runs.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-")


# No deadline and no limit on slow generation: a busy machine is not a wrong result. The default
# profile is derandomized: a change fails because of the change, not because of the examples drawn
# that day. The nightly profile draws new examples every time, and prints how to repeat a failure.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile(
    "nightly", max_examples=200, derandomize=False, print_blob=True, **_PATIENT
)
settings.register_profile("default", max_examples=25, derandomize=True, **_PATIENT)
settings.load_profile("default")  # `pytest --hypothesis-profile nightly` overrides this

# What the tests of several files share, so that one process makes it once: a Prefect server with a
# finished order ("world"), or with orders of their own; exports, which take seconds each; and runs
# of every method. The longest groups begin first, or one process ends alone (with
# --no-loadscope-reorder). Every other file is a group of its own.
GROUPS = {
    "world": {
        "test_budget",
        "test_canaries",
        "test_cli",
        "test_compress",
        "test_explain",
        "test_flow_in_moved_home",
        "test_recipe",
        "test_triton_warmups",
    },
    "orders": {
        "test_dense_order",
        "test_planted_results",
        "test_presets",
        "test_readme_commands",
        "test_refused_orders",
        "test_retrieval",
        "test_s3",
        "test_service_outages",
        "test_teaching",
    },
    "graphs": {
        "test_audit",
        "test_bfloat16_dense",
        "test_lowered_graphs",
        "test_lowering",
        "test_parity",
    },
    "runs": {"test_composed", "test_outline", "test_steps"},
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest groups first."""
    places = {name: place for place, name in enumerate(GROUPS)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid), len(places)))


def group_of(nodeid: str) -> str:
    """The group of a test: all tests of a group run in one process, one after another."""
    path = Path(nodeid.partition("::")[0])
    if path.parent.name == "faults":  # one server of forks
        return "faults"
    return GROUP_OF.get(path.stem, path.stem)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """Schedule by ``group_of`` under ``--dist loadgroup``.

    xdist 3.8 marks groups by changing a private attribute of each test, which pytest 9.2 no longer
    reads: without this every test would be a group of its own.
    """
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


class GroupScheduling(LoadScopeScheduling):
    """Sends whole groups to a process, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_collection_finish() -> None:
    """What is imported and collected lives to the end: the garbage collector need not look."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def _operators_read_once() -> Iterator[None]:
    with operators_read_once():
        yield


@pytest.fixture(autouse=True)
def _own_surroundings(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a person's own store, registry or cloud account."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_TRACKING_")) or name in PLACES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("RECPRESS_HOME", str(home / "recpress"))
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "no-credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "no-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for the whole run. If it cannot start, tests fail rather than skip."""
    with running_server(Path(tmp_path_factory.mktemp("seaweedfs"))) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with the environment of this test pointing to it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
