"""Pydantic types of the paths in ``model.json``, which reject paths that are unsafe to open.

For an unsafe path pydantic reports an error with the reason.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator

from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from infra.bundle.json_reader import shorten


def _find_path_problem(text: str) -> Reason | None:
    """Return why a path is unsafe or unusable on any system; None if it is neither."""
    if not text or not text.isprintable():
        return Reason("path_not_printable")
    if "\\" in text:
        return Reason("path_with_backslash")
    if ".." in PurePosixPath(text).parts:
        return Reason("path_with_parent")
    if re.match(r"[A-Za-z]:|[\w+.-]+://", text):
        return Reason("path_with_scheme")
    # Linux allows 255 bytes in a name and 4,095 in a path.
    if max(len(part.encode()) for part in text.split("/")) > 255 or len(text.encode()) > 4000:
        return Reason("path_too_long")
    return None


def _require_inside(text: str) -> str:
    """Validate an ``InsidePath``."""
    problem = _find_path_problem(text)
    if problem is None and text.startswith("/"):
        problem = Reason("path_absolute")
    if problem is not None:
        raise value_error("path_not_inside", path=shorten(text), reason=problem)
    return text


def _require_file_name(text: str) -> str:
    """Validate a ``FileName``."""
    if "/" in _require_inside(text):
        raise value_error("path_in_subfolder", path=shorten(text))
    return text


def _require_usable_draft_path(text: str) -> str:
    """Validate a ``DraftPath``; ``read_draft`` checks whether it is inside the draft's folder."""
    if problem := _find_path_problem(text):
        raise value_error("draft_path_unusable", path=shorten(text), reason=problem)
    return text


InsidePath = Annotated[str, AfterValidator(_require_inside)]
"""A relative path of a file in a folder or its subfolders."""

FileName = Annotated[str, AfterValidator(_require_file_name)]
"""The name of a file directly in its folder."""

DraftPath = Annotated[str, AfterValidator(_require_usable_draft_path)]
"""A path that a user writes in a draft: absolute, or relative and inside the draft's folder."""
