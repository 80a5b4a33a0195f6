"""The type ``Artifact``: a stored object, named by its content hash, that tasks exchange."""

import hashlib
import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from compressors.contracts.frozen import Frozen

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def digest(value: Any) -> str:
    """Compute the SHA-256 of a value's canonical JSON.

    Keys are sorted, there are no spaces, and a pydantic model is an object of its fields.

    Returns:
        The hash as 64 lower-case hexadecimal digits.

    Raises:
        TypeError: the value contains an object without a JSON form.
    """

    def to_json_value(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"{type(item).__name__} has no canonical JSON form")

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=to_json_value)
    return hashlib.sha256(text.encode()).hexdigest()


_ARTIFACT_URI = re.compile(r"(?:.*/)?artifacts/([0-9a-f]{64})/?", re.DOTALL)


def artifact_name(uri: str) -> str | None:
    """Return the SHA-256 in an artifact's URI, ``[<root>/]artifacts/<sha256>``, or None."""
    match = _ARTIFACT_URI.fullmatch(uri)
    return None if match is None else match[1]


def _remove_root(uri: str) -> str:
    """Return an artifact's URI relative to the root of the store; other URIs unchanged."""
    name = artifact_name(uri)
    return uri if name is None else f"artifacts/{name}"


class Artifact(Frozen):
    """A stored object, named by its content hash; the only value that tasks exchange.

    Attributes:
        uri: ``artifacts/<sha256>``, relative to the root of the store, so that a store can be moved
            or mounted elsewhere. Earlier versions of recpress wrote the root into the URI; it is
            removed when such a URI is read.
        sha256: hash over the manifest, which lists the artifact's files and the hash of each part
            ("chunk") of a file.
        bytes: total size of all files.
    """

    uri: Annotated[str, AfterValidator(_remove_root)]
    sha256: Sha256
    bytes: int = Field(ge=0)
