"""Which tests run in one process, so that what they share is made once.

xdist 3.8 marks groups by changing a private attribute of each test, which pytest 9.2 no longer
reads: its own ``--dist loadgroup`` makes every test a group. So the scheduler computes them here.
"""

from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

# What the tests of several files share, so that one process makes it once: a Prefect server and a
# finished order; exports, which take seconds each; and runs of every method. The longest groups
# begin first, or one process ends alone (with --no-loadscope-reorder), and none takes a third of
# all. Every other file is a group of its own.
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
    "runs": {"test_composed", "test_dry_run_of_steps", "test_steps"},
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def group_of(nodeid: str) -> str:
    """The group of a test: all tests of a group run in one process, one after another."""
    path = Path(nodeid.partition("::")[0])
    if path.parent.name == "faults":  # one server of forks
        return "faults"
    return GROUP_OF.get(path.stem, path.stem)


class GroupScheduling(LoadScopeScheduling):
    """Sends whole groups to a process, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
