"""Test tiers: Hypothesis profiles, groups of files, and the command that runs all tiers.

A tier is the set of tests with a marker such as ``nightly``; the default tier has no such marker.
"""

import ast
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import groups
import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests").rglob("test_*.py"))
# By group, the fixtures that share a Prefect server or a finished order between tests of flows.
SHARED_FIXTURES = {
    "flows": {
        "prefect_server",
        "prefect_folder",
        "accepted_order",
        "session_order",
        "without_champion",
    },
    "added": {"added_order"},
}


def test_hypothesis_profiles_have_25_fixed_examples_by_default_and_200_random_ones_nightly():
    default, nightly = (settings.get_profile(name) for name in ("default", "nightly"))
    assert (default.max_examples, default.derandomize) == (25, True)
    assert (nightly.max_examples, nightly.derandomize) == (200, False)
    assert default.deadline is nightly.deadline is None


def test_no_test_sets_its_number_of_examples():
    files = {path.name for path in FILES if "max_examples" in path.read_text()}
    assert files == {Path(__file__).name}


def test_make_test_all_runs_every_tier_except_gpu_with_the_nightly_profile():
    makefile = (ROOT / "Makefile").read_text()
    (command,) = re.findall(
        r"^test-all:.*\n\t\$\(PYTEST\) (.*) \$\(ARGS\)$", makefile, re.MULTILINE
    )
    assert command == "-m 'not gpu' --hypothesis-profile nightly"
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    tiers = {marker.partition(":")[0] for marker in options["markers"]}
    (excluded,) = re.findall(r"-m '(.*)'", options["addopts"])
    assert set(excluded.replace("not ", "").split(" and ")) == tiers


def fixtures_of(path: Path) -> set[str]:
    """Return the names of all function arguments in a file, which include the fixtures."""
    tree = ast.parse(path.read_text())
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


@pytest.mark.parametrize("path", (ROOT / "tests" / "flows").glob("test_*.py"), ids=lambda p: p.stem)
def test_files_that_share_a_fixture_of_flows_are_in_one_group(path: Path):
    used = [name for name, shared in SHARED_FIXTURES.items() if fixtures_of(path) & shared]
    assert [groups.group_of(f"tests/flows/{path.name}::test_x")] == (used or [path.stem])


def test_every_grouped_file_exists():
    names = {path.stem for path in FILES}
    assert set(groups.GROUP_OF) <= names
    assert sum(map(len, groups.GROUPS.values())) == len(groups.GROUP_OF)


def test_loadgroup_sends_the_tests_of_a_group_to_one_process(pytestconfig):
    """The groups of xdist do not work with pytest 9.2: every test would be a group."""
    nodes = (
        "tests/compressors/lower/test_lowering.py::test_a[x-tests/y.py::z]",
        "tests/compressors/lower/test_audit.py::test_b",
        "tests/faults/test_kills.py::test_c",
        "tests/infra/test_store.py::TestD::test_d[1]",
        "tests/test_random_networks.py::test_e[3]",
    )

    def scopes(markers: str) -> list[str]:
        values = {"dist": "loadgroup", "tx": ["2*popen"], "markexpr": markers}
        plugin = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
        config = SimpleNamespace(getvalue=values.__getitem__)
        scheduler = plugin.pytest_xdist_make_scheduler(config, log=None)
        assert isinstance(scheduler, groups.GroupScheduling)
        return [scheduler._split_scope(node) for node in nodes]

    by_file = ["graphs", "graphs", "faults", "test_store", "test_random_networks"]
    assert scopes("not slow and not nightly") == by_file
    # Faults and random networks take hours in the nightly tier, so processes share their tests.
    assert scopes("not gpu") == ["graphs", "graphs", nodes[2], "test_store", nodes[4]]
