"""Calls in the sources of the four packages, parsed once for all tests that check them."""

import ast
import functools
from collections.abc import Collection, Mapping
from pathlib import Path

from compressors.contracts.coded_error import field_names

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "compressors", "infra")


@functools.cache
def _calls() -> tuple[tuple[str, ast.Call], ...]:
    """Every call of a plain name, with its place."""
    paths = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return tuple(
        (f"{path.relative_to(ROOT)}:{node.lineno}:{node.col_offset}", node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )


def calls_of(names: Collection[str]) -> list[tuple[str, ast.Call]]:
    """Every call of one of these names: ``file:line:column`` and the call."""
    return [
        (place, call)
        for place, call in _calls()
        if isinstance(call.func, ast.Name) and call.func.id in names
    ]


def fits(call: ast.Call, sentences: Mapping[str, str]) -> bool:
    """Whether a call has one argument, a literal code, and exactly the fields of its sentence."""
    if len(call.args) != 1 or not isinstance(call.args[0], ast.Constant):
        return False
    sentence = sentences.get(call.args[0].value)
    given = {keyword.arg for keyword in call.keywords}
    return sentence is not None and given == field_names(sentence)
