"""The protocol of a key-value storage backend, and the backend that a configured root selects.

A key is a relative path with forward slashes; its value is the content of one file or S3 object.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from infra.errors import SettingRefused
from infra.settings import public_uri
from infra.store.folder import Folder
from infra.store.manifest import require_portable_path
from infra.store.s3 import Bucket

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


class Backend(Protocol):
    """Stores bytes under keys, in a local folder or an S3 bucket.

    Methods raise only the error classes of ``infra.errors``. A reader never receives a partly
    written value.
    """

    uri: str

    def local_path(self, key: str) -> Path | None:
        """Return the local path of a key or key prefix; None if keys are not local files."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return every key that begins with ``prefix``, with its size in bytes."""

    def size(self, key: str) -> int | None:
        """Return the size of a key in bytes; None if the key does not exist."""

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes [start, stop) of a key, or fewer if its value ends earlier.

        Raises:
            ArtifactMissing: the key does not exist.
        """

    def create(self, key: str, body: bytes) -> None:
        """Write a new key; readers see either no key or the complete value.

        Raises:
            AlreadyThere: the key exists.
        """

    def write(self, key: str, body: bytes) -> None:
        """Write a key; an existing value is replaced."""

    def move(self, file: Path, key: str) -> bool:
        """Move a local file to a key without copying it.

        Returns:
            False if that is impossible: nothing was moved, and the caller must copy the file.
        """

    def link(self, key: str, to: str) -> None:
        """Create a hard link from key ``to`` to an existing key; a bucket does nothing."""

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write or replace a key of ``size`` bytes; if ``chunks`` raises, the key is unchanged."""

    def upload_new(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a new key as ``upload`` does.

        Raises:
            AlreadyThere: the key exists.
        """


def create_backend(root: str, setting: str) -> Backend:
    """Return the backend of a folder, ``file:///folder`` or ``s3://bucket/prefix``.

    Args:
        root: the configured root, in one of these three forms.
        setting: name of the variable or option that contains ``root``, for the error message.

    Raises:
        SettingRefused: ``root`` has none of these forms.
    """
    if root.startswith("s3://"):
        bucket, _, prefix = root.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not _BUCKET.fullmatch(bucket):
            raise SettingRefused("root_bucket_invalid", setting=setting, root=public_uri(root))
        try:
            return Bucket(bucket, require_portable_path(prefix) if prefix else "")
        except ValueError:
            raise SettingRefused(
                "root_prefix_invalid", setting=setting, root=public_uri(root)
            ) from None
    path = root
    if root.startswith("file://"):
        path = unquote(root.removeprefix("file://"))
        if not path.startswith("/"):
            raise SettingRefused("root_file_uri_form", setting=setting, root=public_uri(root))
    elif _SCHEME.match(root):
        raise SettingRefused("root_scheme_unknown", setting=setting, root=public_uri(root))
    if not path.strip() or "\0" in path:
        raise SettingRefused("root_empty", setting=setting, root=public_uri(root))
    return Folder(Path(os.path.abspath(Path(path).expanduser())))  # noqa: PTH100 (keeps symlinks)
