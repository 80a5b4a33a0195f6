"""Groups of test files that run in one process, so that cached results are computed only once.

xdist 3.8 marks the group of a test in a private attribute, which pytest 9.2 no longer reads. With
``--dist loadgroup`` alone, every test would therefore be a group. The scheduler in this file
computes the groups from the names of the test files.
"""

from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

# The files of a group share a Prefect server and finished orders ("flows"), exports, which take
# seconds each ("graphs"), runs of every method ("runs"), or one order ("added"). Each other file is
# a group. The longest groups start first (with --no-loadscope-reorder), so that no process is busy
# alone at the end. For the same reason, each group must take less than a third of the total time.
GROUPS = {
    "flows": {
        "test_budget",
        "test_canaries",
        "test_cli",
        "test_compress",
        "test_dense_order",
        "test_embedded_server",
        "test_explain",
        "test_flow_after_upgrade",
        "test_flow_in_moved_home",
        "test_planted_results",
        "test_recipe",
        "test_refused_orders",
        "test_s3",
        "test_service_outages",
        "test_triton_warmups",
    },
    "graphs": {
        "test_audit",
        "test_bfloat16_dense",
        "test_lowered_graphs",
        "test_lowering",
        "test_parity",
    },
    "added": {"test_added_metric", "test_added_table_format", "test_added_task_kind"},
    "runs": {"test_composed", "test_dry_run_of_steps", "test_steps"},
}
FAULTS = "faults"
LONG_IN_NIGHTLY = (
    FAULTS,
    "test_random_networks",
    "test_golden",
    "test_repeated_promotions",
    "test_order_records",
)
"""Groups with tests of many minutes in the nightly tier, so that processes share their tests."""
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def group_of(nodeid: str) -> str:
    """Return the name of the group of a test."""
    path = Path(nodeid.partition("::")[0])
    if path.parent.name == "faults":  # these tests share one process that forks others
        return FAULTS
    return GROUP_OF.get(path.stem, path.stem)


def has_nightly_tests(config: Any) -> bool:
    """Return whether a run of pytest selects the tests of the nightly tier."""
    return "not nightly" not in config.getvalue("markexpr")


class GroupScheduling(LoadScopeScheduling):
    """Sends whole groups to processes, in the order of collection.

    In the nightly tier each test of the long groups is a group.
    """

    def _split_scope(self, nodeid: str) -> str:
        group = group_of(nodeid)
        is_split = group in LONG_IN_NIGHTLY and has_nightly_tests(self.config)
        return nodeid if is_split else group
