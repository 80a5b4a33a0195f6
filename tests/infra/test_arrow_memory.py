"""Arrow's memory pool in a process that imports a module of ``infra``."""

import os
import subprocess
import sys

import pytest
from drafts import ROOT

from infra.arrow_memory import ARROW_POOL


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "system"), ({"ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}, "mimalloc")],
)
def test_arrow_uses_the_system_pool_unless_the_variable_is_set(
    variables: dict[str, str], expected: str
) -> None:
    """The default pool, mimalloc, reserves 1 GiB of address space, which a process may not have.

    ``ARROW_POOL`` has the environment variable that selects the pool.
    """
    env = {name: value for name, value in os.environ.items() if name not in ARROW_POOL} | variables
    code = "import infra.data.splits, pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == expected
