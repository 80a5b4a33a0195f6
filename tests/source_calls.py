"""Find calls of functions in the sources of the four packages, which are parsed only once.

Only calls of a plain name, such as ``Reason(...)``, are found; calls of an attribute, such as
``reasons.Reason(...)``, are not.
"""

import ast
import functools
from collections.abc import Collection, Mapping
from pathlib import Path

from compressors.contracts.coded_error import field_names

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "compressors", "infra")


@functools.cache
def _calls() -> tuple[tuple[str, ast.Call], ...]:
    """Return all calls of a plain name, each with its position, ``file:line:column``."""
    paths = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return tuple(
        (f"{path.relative_to(ROOT)}:{node.lineno}:{node.col_offset}", node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )


def calls_of(names: Collection[str]) -> list[tuple[str, ast.Call]]:
    """Return all calls of one of these names, each with its position, ``file:line:column``."""
    return [
        (position, call)
        for position, call in _calls()
        if isinstance(call.func, ast.Name) and call.func.id in names
    ]


def has_code_and_fields(call: ast.Call, sentences: Mapping[str, str]) -> bool:
    """Return whether the only positional argument is a known code, with the fields of its sentence.

    The keyword arguments must be exactly these fields.
    """
    if len(call.args) != 1 or not isinstance(call.args[0], ast.Constant):
        return False
    sentence = sentences.get(call.args[0].value)
    fields = {keyword.arg for keyword in call.keywords}
    return sentence is not None and fields == field_names(sentence)
