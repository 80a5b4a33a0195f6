"""Small JSON records with a checksum, so that a reader detects damage.

A record is one JSON object. Its last field, the seal, is the SHA-256 of all bytes before its line.
The seal detects damage but is not a signature: anyone can compute it. So a record contains only
references to artifacts, and the reader checks that each artifact belongs to the record's key.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.bundle.json_reader import decode, escape_message
from infra.errors import BundleRefused, RecordRefused
from infra.store.object_store import Store

SEAL = "seal"


def seal_record(fields: Mapping[str, Any]) -> bytes:
    """Encode a record with its seal.

    Args:
        fields: at least one field; all values can be encoded as JSON.
    """
    body = json.dumps(fields, indent=1).removesuffix("\n}").encode() + b",\n"
    return body + _seal_line(body)


def is_sealed(body: bytes) -> bool:
    """Return whether the last field of a record is the SHA-256 of all bytes before its line."""
    size = len(_seal_line(b""))
    return body[-size:] == _seal_line(body[:-size])


def read_record(store: Store, key: str) -> tuple[dict[str, Any], bool]:
    """Read a record.

    Records of version 0.1.0 have no seal. A caller that accepts them must verify their fields
    otherwise.

    Returns:
        The fields without the seal, and whether the record has a seal that matches.

    Raises:
        ArtifactMissing: the record does not exist.
        RecordRefused: it is not a plain file, is too large, or is not one plain JSON object.
    """
    body = store.read(key)
    if store.folder is None and not is_sealed(body):
        body = store.read(key)  # retry once: a byte may have changed in transit from the bucket
    try:
        fields = decode(body, Path(key))
    except BundleRefused as fault:
        problem = escape_message(fault).rstrip(".")
        raise RecordRefused(
            "record_damaged", place=f"{store.root}/{key}", problem=problem
        ) from fault
    sealed = is_sealed(body)
    if sealed:
        del fields[SEAL]
    return fields, sealed


def _seal_line(body: bytes) -> bytes:
    """Return the last field and the closing bracket of a record whose other bytes are ``body``."""
    return f' "{SEAL}": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
