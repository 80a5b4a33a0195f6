"""The protocol of a place that stores keys, and the place that a root refers to."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from infra.errors import SettingRefused
from infra.settings import shown
from infra.store.folder import Folder
from infra.store.manifest import plain_path
from infra.store.s3 import Bucket

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


class Place(Protocol):
    """Stores keys. It raises errors of ``infra`` only, and never exposes a partly written key."""

    uri: str

    def in_place(self, key: str) -> Path | None:
        """Return the local path of a key prefix, if this place is a local folder."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return every key that begins with ``prefix``, with its size in bytes."""

    def size(self, key: str) -> int | None:
        """Return the size of a key in bytes; None if there is none."""

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Read bytes ``start`` to ``stop``, or to the end; raises ``ArtifactMissing``."""

    def create(self, key: str, body: bytes) -> None:
        """Write a new key, atomic with its content; raises ``AlreadyThere``."""

    def write(self, key: str, body: bytes) -> None:
        """Write a key, replacing its content."""

    def move(self, file: Path, key: str) -> bool:
        """Move a local file to a key without copying it; returns False if that is impossible."""

    def link(self, key: str, to: str) -> None:
        """Give an existing key a second name where readers open files in place; else nothing."""

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a large file; if ``chunks`` raises, the key is unchanged."""

    def upload_new(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a new large file, as ``upload``; raises ``AlreadyThere``."""


def place_of(root: str, setting: str) -> Place:
    """Return the place of a folder, ``file:///folder`` or ``s3://bucket/prefix``.

    Args:
        root: the configured root.
        setting: the variable or option that set it, for the error message.

    Raises:
        SettingRefused: ``root`` is none of these.
    """
    if root.startswith("s3://"):
        bucket, _, prefix = root.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not _BUCKET.fullmatch(bucket):
            raise SettingRefused("root_bucket_invalid", setting=setting, root=shown(root))
        try:
            return Bucket(bucket, plain_path(prefix) if prefix else "")
        except ValueError:
            raise SettingRefused("root_prefix_invalid", setting=setting, root=shown(root)) from None
    path = root
    if root.startswith("file://"):
        path = unquote(root.removeprefix("file://"))
        if not path.startswith("/"):
            raise SettingRefused("root_file_uri_form", setting=setting, root=shown(root))
    elif _SCHEME.match(root):
        raise SettingRefused("root_scheme_unknown", setting=setting, root=shown(root))
    if not path.strip() or "\0" in path:
        raise SettingRefused("root_empty", setting=setting, root=shown(root))
    return Folder(Path(os.path.abspath(Path(path).expanduser())))  # noqa: PTH100 (keeps symlinks)
