"""Where the keys of a store can lie: what such a place does, and which one a root names."""

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
    """Where keys lie. Errors are ours, and no key is ever visible half-written."""

    uri: str

    def in_place(self, key: str) -> Path | None:
        """The local path of a key prefix, if this place is a local folder."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Every key that begins with ``prefix``, with its size in bytes."""

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``; fewer if it ends before. ``ArtifactMissing``."""

    def create(self, key: str, body: bytes) -> None:
        """Write a new key, atomic with its content. ``AlreadyThere``."""

    def write(self, key: str, body: bytes) -> None:
        """Write a key, replacing what it held."""

    def move(self, file: Path, key: str) -> bool:
        """Put a file of this machine under a key without copying it; False if that cannot be."""

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a large file; if ``chunks`` raises, the key is as it was before."""


def place_of(root: str, setting: str) -> Place:
    """The place a folder, ``file:///folder`` or ``s3://bucket/prefix`` names.

    Args:
        root: what was set.
        setting: by which variable or option, for the message.

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
