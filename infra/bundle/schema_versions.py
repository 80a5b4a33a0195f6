"""Versions of ``model.json``: migrate documents of earlier versions to the present one.

A stored bundle is migrated each time it is read and never rewritten, so its hashes do not change.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from infra.bundle.json_reader import short
from infra.errors import BundleRefused

SCHEMA_VERSION: Final = 2
"""Written by this version of recpress."""

KNOWN_VERSIONS: Final = (1, 2)

_OUTPUT_FIELDS = {"kind": "task", "form": "output", "label": "label", "metric": "metric"}
"""Field of the output by its name in version 1, where it was a field of the signature."""

VERSION_1_PLACES: Final = {
    "signature.outputs[0]": "signature",
    **{f"signature.outputs[0].{new}": f"signature.{old}" for new, old in _OUTPUT_FIELDS.items()},
}
"""Places in a document of version 1, by their place in the migrated document."""


def require_known_version(document: Mapping[str, Any], path: Path) -> None:
    """Raise if a ``model.json`` has no version, or one that cannot be read.

    Args:
        document: the decoded file.
        path: its file, for the error message.

    Raises:
        BundleRefused: contains the version.
    """
    version = document.get("schema_version")
    place, got = str(path), short(version)
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
    """Return a ``model.json`` of any known version as one of ``SCHEMA_VERSION``.

    Version 1 has one output, whose fields belong to the signature: ``task``, ``output``, ``label``
    and ``metric``. It has no name, and is called ``score`` as in the served graph. Everything else
    is unchanged, wrong fields too: they are reported when the result is validated.

    Args:
        document: the decoded file, with one of ``KNOWN_VERSIONS``; it is not modified.
    """
    migrated = dict(document)
    if migrated["schema_version"] == 1:
        migrated["schema_version"] = 2
        if isinstance(signature := migrated.get("signature"), dict):
            migrated["signature"] = _with_outputs(signature)
    return migrated


def _with_outputs(signature: Mapping[str, Any]) -> dict[str, Any]:
    fields = {new: signature[old] for new, old in _OUTPUT_FIELDS.items() if old in signature}
    rest = {name: v for name, v in signature.items() if name not in _OUTPUT_FIELDS.values()}
    return {**rest, "outputs": [{"name": "score", **fields}]}
