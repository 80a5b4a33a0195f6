"""Small JSON records with a seal, so that a reader detects damage.

A record is one JSON object. Its last line, the seal, is the SHA-256 of all bytes before that
line, as in a bundle's ``model.json``. A seal detects damage; it is not a signature. So a record
contains references only, and its reader compares the referenced content with the record's key.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.bundle.json_reader import clean, decode
from infra.errors import BundleRefused, RecordRefused
from infra.store.object_store import Store

SEAL = "seal"


def seal_record(fields: Mapping[str, Any]) -> bytes:
    """Encode a record with its seal.

    Args:
        fields: plain values; at least one.
    """
    body = json.dumps(fields, indent=1).removesuffix("\n}").encode() + b",\n"
    return body + _seal_line(body)


def is_sealed(body: bytes) -> bool:
    """Return whether the last line of a record is the seal over all bytes before it."""
    size = len(_seal_line(b""))
    return body[-size:] == _seal_line(body[:-size])


def read_record(store: Store, key: str) -> tuple[dict[str, Any], bool]:
    """Read the fields of a record, and whether its seal was verified.

    Records of version 0.1.0 have no seal. A caller that accepts them compares their fields.

    Raises:
        ArtifactMissing: there is no such record.
        RecordRefused: it is damaged: not a plain file, too large, or not one plain JSON object.
    """
    body = store.read(key)
    if store.folder is None and not is_sealed(body):
        body = store.read(key)  # a byte may have changed in transit from a bucket
    try:
        fields = decode(body, Path(key))
    except BundleRefused as fault:
        problem = clean(fault).rstrip(".")
        raise RecordRefused(
            "record_damaged", place=f"{store.root}/{key}", problem=problem
        ) from fault
    sealed = is_sealed(body)
    if sealed:
        del fields[SEAL]
    return fields, sealed


def _seal_line(body: bytes) -> bytes:
    return f' "{SEAL}": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
