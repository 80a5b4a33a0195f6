"""The files of the repository, for tests that read all of them."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def repository_files() -> list[Path]:
    """Return tracked files, and new ones that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of tracked files")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    files = [path for path in files if path.is_file()]
    assert len(files) > 40, "the list of files is too short to be this repository"
    return files
