"""The name of a target occurs only in its folder, its declaration and its adapters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_calls import PACKAGES, ROOT

from compressors.contracts import TARGETS

# ``field`` is the name of the target's setting in an order, such as ``tensorrt_rtx``.
NAMES = {name for item in TARGETS.values() for name in (item.name, item.field)}
LOWERINGS = "compressors.lower.targets."
ALLOWED_FOLDERS = (
    "compressors/contracts/targets/",  # the declarations
    "compressors/lower/targets/",
    "infra/onnxruntime/",
    "infra/tensorrt/",
)
EXCEPTIONS = {
    "compressors/contracts/memory_errors.py",  # names of imported modules
    "flows/cli/demo.py",  # the order of the demo
}


def target_names(tree: ast.AST) -> Iterator[str]:
    """Yield each constant, attribute and keyword that is a target's name, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(name)) | ast.Attribute(attr=name):
                pass
            case ast.keyword(arg=str(name)):
                pass
            case _:
                continue
        if name in NAMES:
            yield f"{node.lineno}: {name}"


def imported_lowerings(tree: ast.AST) -> Iterator[str]:
    """Yield each import from the folder of one target."""
    for node in ast.walk(tree):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module is not None and module.startswith(LOWERINGS):
            first = module.removeprefix(LOWERINGS).partition(".")[0]
            if first.replace("_", "-") in TARGETS:
                yield f"{node.lineno}: {module}"


def parsed_sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def test_no_source_outside_its_folders_contains_the_name_of_a_target() -> None:
    names_by_path = {
        path: list(target_names(tree))
        for path, tree in parsed_sources()
        if not path.startswith(ALLOWED_FOLDERS)
    }
    assert {path: names for path, names in names_by_path.items() if names}.keys() == EXCEPTIONS


def test_no_source_outside_the_targets_imports_the_folder_of_one() -> None:
    for path, tree in parsed_sources():
        if not path.startswith("compressors/lower/targets/"):
            assert list(imported_lowerings(tree)) == [], path


def test_the_folders_of_targets_contain_their_names() -> None:
    for folder in ALLOWED_FOLDERS:
        trees = [ast.parse(path.read_text()) for path in (ROOT / folder).rglob("*.py")]
        assert trees, folder
    registry = Path(ROOT / "compressors/contracts/targets/registry.py")
    assert {name.partition(": ")[2] for name in target_names(ast.parse(registry.read_text()))} >= {
        item.name for item in TARGETS.values()
    }


@pytest.mark.parametrize(
    "source",
    [
        'if target == "onnxruntime": ...',
        'match target:\n    case "tensorrt": ...',
        "order.targets.tensorrt_rtx",
        "Targets(tensorrt='off')",
        'PLATFORMS = {"tensorrt-rtx": 1}',
        'TargetKind = Literal["onnxruntime"]',
    ],
)
def test_target_names_finds_names_in_constants_attributes_and_keywords(source: str) -> None:
    assert len(list(target_names(ast.parse(source)))) == 1
