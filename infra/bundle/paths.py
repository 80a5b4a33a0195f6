"""Paths in ``model.json``: which of them may be followed.

Pydantic types; a path that may not be followed is a validation error that says why.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from compressors.contracts.value_errors import value_error
from infra.bundle.json_reader import short


def _path_problem(text: str) -> str | None:
    """Why a path may not be followed, or None."""
    if not text or not text.isprintable():
        return "is empty or has characters that cannot be shown"
    if "\\" in text:
        return "has a backslash; write paths with /"
    if ".." in PurePosixPath(text).parts:
        return "has '..', which leaves the folder"
    if re.match(r"[A-Za-z]:|[\w+.-]+://", text):
        return "has a scheme or a drive letter; only plain paths are read here"
    if max(len(part.encode()) for part in text.split("/")) > 255 or len(text.encode()) > 4000:
        return "is longer than a file system allows"
    return None


def _inside(text: str) -> str:
    if problem := _path_problem(text) or ("is absolute" if text.startswith("/") else None):
        raise value_error("path_not_inside", path=short(text), reason=problem)
    return text


def _flat(text: str) -> str:
    if "/" in _inside(text):
        raise value_error("path_in_subfolder", path=short(text))
    return text


def _draft_path(text: str) -> str:
    if problem := _path_problem(text):
        raise value_error("draft_path_unusable", path=short(text), reason=problem)
    return text


InsidePath = Annotated[str, AfterValidator(_inside)]
FileName = Annotated[str, AfterValidator(_flat)]
DraftPath = Annotated[str, AfterValidator(_draft_path)]
