"""Select the memory pool of Arrow (pyarrow) for this process and its child processes.

Arrow reads an environment variable when it is imported. ``infra/__init__.py`` therefore calls
``select_system_pool``, before a module of ``infra`` imports Arrow. Child processes inherit the
variable. ``pyarrow.set_memory_pool`` is not enough, because Arrow's file readers use the default
pool.
"""

import os

# The default pool, mimalloc, reserves 1 GiB of address space at once if the limit ``ulimit -v``
# allows it. If too little remains, torch fails, and Arrow fails or even aborts the process.
ARROW_POOL = {"ARROW_DEFAULT_MEMORY_POOL": "system"}


def select_system_pool() -> None:
    """Set the environment variable of ``ARROW_POOL``, unless it is already set."""
    for name, value in ARROW_POOL.items():
        os.environ.setdefault(name, value)
