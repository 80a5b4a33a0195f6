"""Select Arrow's memory pool, in every process.

Arrow reads its variable when it is imported, so this must run first: importing any module of
``infra`` runs it. Child processes inherit the variable. ``pyarrow.set_memory_pool`` is no
replacement: Arrow's file readers use the default pool.
"""

import os

# mimalloc, the default pool, reserves 1 GiB of address space in one piece if it fits below
# ``ulimit -v``. With too little left, Arrow or torch fails, or Arrow aborts the process.
ARROW_POOL = {"ARROW_DEFAULT_MEMORY_POOL": "system"}


def select_system_pool() -> None:
    """Set the variable of ``ARROW_POOL`` in this process, except if it is already set."""
    for name, value in ARROW_POOL.items():
        os.environ.setdefault(name, value)
