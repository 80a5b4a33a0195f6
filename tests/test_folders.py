"""Each folder of the packages lists its files; sizes of folders and files are limited."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "compressors", "infra")
MAX_FILES = 15
MAX_LINES = 450
LONG_FILES = {"compressors/quantize/kernels/numba_kernels.py"}
"""Files that may be longer; their docstrings give the reason."""

FOLDERS = sorted(path.parent for top in PACKAGES for path in (ROOT / top).rglob("__init__.py"))
FILES = sorted(path for top in PACKAGES for path in (ROOT / top).rglob("*.py"))


def relative_path(path: Path) -> str:
    return str(path.relative_to(ROOT))


def listed_files(folder: Path) -> list[str]:
    """Return the files and subfolders that the docstring of ``__init__.py`` lists."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return re.findall(r"^(\w+(?:\.py|/)) +\S", text, re.MULTILINE)


def python_files(folder: Path) -> set[str]:
    """Return the Python files of a folder, and its subfolders that contain Python files."""
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    return files | {f"{path.parent.name}/" for path in folder.glob("*/*.py")}


@pytest.mark.parametrize("folder", FOLDERS, ids=relative_path)
def test_each_folder_lists_each_of_its_files_once(folder):
    assert sorted(listed_files(folder)) == sorted(python_files(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=relative_path)
def test_each_folder_has_at_most_15_python_files(folder):
    assert len(list(folder.glob("*.py"))) <= MAX_FILES


def test_every_folder_with_python_files_is_a_package():
    assert {path.parent for path in FILES} == set(FOLDERS)


def test_only_files_with_a_stated_reason_are_longer_than_450_lines():
    long = {relative_path(path) for path in FILES if len(path.read_text().splitlines()) > MAX_LINES}
    assert long == LONG_FILES
