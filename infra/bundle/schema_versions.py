"""Migrate ``model.json`` documents of earlier schema versions to the current version.

A stored bundle is migrated each time it is read, and its file is never rewritten, so the hashes of
the bundle do not change.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from infra.bundle.json_reader import shorten
from infra.errors import BundleRefused

SCHEMA_VERSION: Final = 2
"""The version that recpress writes now."""

KNOWN_VERSIONS: Final = (1, 2)

_OUTPUT_FIELDS = {"kind": "task", "form": "output", "label": "label", "metric": "metric"}
"""Maps each field of an output (version 2) to the signature's field with its value in version 1."""

VERSION_1_LOCATIONS: Final = {
    "signature.outputs[0]": "signature",
    **{f"signature.outputs[0].{new}": f"signature.{old}" for new, old in _OUTPUT_FIELDS.items()},
}
"""Maps a location in the migrated document to its location in the version 1 document."""


def require_known_version(document: Mapping[str, Any], path: Path) -> None:
    """Raise if the schema version of a ``model.json`` is missing or unknown.

    Args:
        document: the decoded ``model.json``.
        path: its path, for the error message.

    Raises:
        BundleRefused: the version is missing, unknown, or lower than the fields require.
    """
    version = document.get("schema_version")
    place, got = str(path), shorten(version)
    if type(version) is not int or version < min(KNOWN_VERSIONS):
        raise BundleRefused("schema_version_unknown", path=place, got=got, known=SCHEMA_VERSION)
    if version > SCHEMA_VERSION:
        raise BundleRefused("schema_version_newer", path=place, got=got, known=SCHEMA_VERSION)
    signature = document.get("signature")
    if version == 1 and isinstance(signature, dict) and "outputs" in signature:
        raise BundleRefused(
            "schema_version_too_old",
            path=place,
            got=got,
            field="signature.outputs",
            known=SCHEMA_VERSION,
        )


def migrate(document: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a ``model.json`` of any known version to ``SCHEMA_VERSION``.

    In version 1 a model has one unnamed output, whose fields ``task``, ``output``, ``label`` and
    ``metric`` are fields of the signature. The migration moves them to ``signature.outputs[0]`` and
    names the output ``score``, as in the served graph. All other fields are unchanged. Invalid
    fields are unchanged too, because the validation of the result reports them.

    Args:
        document: the decoded ``model.json``, with one of ``KNOWN_VERSIONS``; it is not modified.

    Returns:
        A new document of version ``SCHEMA_VERSION``.
    """
    migrated = dict(document)
    if migrated["schema_version"] == 1:
        migrated["schema_version"] = 2
        if isinstance(signature := migrated.get("signature"), dict):
            migrated["signature"] = _move_output_to_list(signature)
    return migrated


def _move_output_to_list(signature: Mapping[str, Any]) -> dict[str, Any]:
    """Return a version 1 signature with its output's fields moved to a list ``outputs``."""
    fields = {new: signature[old] for new, old in _OUTPUT_FIELDS.items() if old in signature}
    other_fields = {
        name: value for name, value in signature.items() if name not in _OUTPUT_FIELDS.values()
    }
    return {**other_fields, "outputs": [{"name": "score", **fields}]}
