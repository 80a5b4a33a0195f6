"""The command ``recpress``: starts the command line with this project's packages.

The packages have common names: ``flows``, ``tasks``, ``compressors`` and ``infra``. If a folder in
PYTHONPATH has a package of the same name, such as a user's repository, Python would import that
one. The name of this module is unique, and it puts this project first.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = ("flows", "tasks", "compressors", "infra")


def main() -> None:
    """Run the command line of recpress."""
    put_project_first(Path(__file__).resolve().parent)
    from flows.cli.app import main as run

    run()


def put_project_first(root: Path) -> None:
    """Move ``root``, the folder of the packages, to the front of ``sys.path`` if necessary.

    The path stays unchanged if all packages are found in ``root``. The ``root`` of an installed
    project is ``site-packages``: at the front, it would take precedence over the standard library.
    Child processes of recpress get this process's path.
    """
    specs = (PathFinder.find_spec(name, sys.path) for name in PACKAGES)
    origins = [spec and spec.origin and Path(spec.origin).resolve().parent.parent for spec in specs]
    if any(origin != root for origin in origins):
        sys.path[:] = [str(root), *(entry for entry in sys.path if entry != str(root))]


if __name__ == "__main__":
    main()
