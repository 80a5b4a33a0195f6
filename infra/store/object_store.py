"""The object store: a local folder or ``s3://bucket/prefix``, content-addressed, verified.

::

    <root>/blobs/<sha256>                     a file, shared by all artifacts that have it
    <root>/artifacts/<sha256>/manifest.json   written last; without it the artifact does not exist
    <root>/artifacts/<sha256>/files/...       in a folder: hard links to the blobs, to map in place
    <root>/<key>                              small records: the ledger, reports

In artifacts with a manifest of version 1 the files below ``files`` are the only ones, in a bucket
too. ``manifest.py`` defines the manifest, ``chunks.py`` reads and hashes files, ``place.py`` is the
protocol of a place that stores keys, ``folder.py`` and ``s3.py`` are its two implementations, and
``artifact_files.py`` writes and reads the files of artifacts.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from compressors.contracts import Artifact, artifact_name
from infra.bundle.json_limits import validated
from infra.bundle.json_reader import short
from infra.errors import (
    AlreadyThere,
    ArtifactDamaged,
    ArtifactMissing,
    ConcurrentChange,
    InfraError,
    RecordRefused,
    Refused,
    StoreRefused,
)
from infra.settings import shown
from infra.store.artifact_files import (
    BLOBS,
    ArtifactFiles,
    add_files,
    checked,
    files_below,
    holds,
)
from infra.store.chunks import hard_links, hashed, regular_files
from infra.store.disk import translate
from infra.store.folder import TEMPORARY, must_be_free
from infra.store.manifest import (
    CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    FileEntry,
    StoreManifest,
    plain_path,
    root_of,
)
from infra.store.place import place_of
from infra.store.temporary import drop_folder, folder_next_to

__all__ = ["CHUNK_BYTES", "MAX_RECORD_BYTES", "FileEntry", "Store", "StoreManifest"]

MAX_RECORD_BYTES = 16 * 2**20

Checked = TypeVar("Checked")

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Store:
    """Stores artifacts by content and small records by key, below one root.

    Args:
        root: a folder, ``file:///folder`` or ``s3://bucket/prefix``. No connection or folder is
            created before the first read or write.
        setting: the source of ``root``, for the error message.

    Raises:
        SettingRefused: ``root`` is none of these.

    Every method that reaches the store may also raise ``StoreUnavailable`` (a retry may help)
    or ``SettingRefused`` (credentials, bucket or permissions are wrong).
    """

    def __init__(self, root: str, setting: str = "RECPRESS_STORE") -> None:
        self._place = place_of(root, setting)
        self.root = self._place.uri

    def put(self, folder: Path) -> Artifact:
        """Store every regular file below ``folder``, unless the store has the same content.

        Returns:
            The artifact, identified by its content.

        Raises:
            StoreRefused: the folder is missing or empty, or holds a symlink or a device.
            ConcurrentChange: a file changed while it was being stored. Nothing was stored.
        """
        manifest = StoreManifest.of(hashed(folder, regular_files(folder)))
        return self._store(folder, manifest, move=False)

    def take(self, folder: Path, manifest: StoreManifest | None = None) -> Artifact:
        """Store files that nothing else uses.

        If the store is on the same disk, they are moved instead of copied; ``folder`` is emptied.

        Args:
            folder: the folder of the files.
            manifest: their hashes, as ``Draft.seal`` returns them; None to compute them.

        Raises:
            StoreRefused, ConcurrentChange: as ``put``. Nothing was stored.
        """
        if manifest is None:
            manifest = StoreManifest.of(hashed(folder, regular_files(folder)))
        return self._store(folder, manifest, move=True)

    def take_derived(self, folder: Path, parent: Artifact, parent_folder: Path) -> Artifact:
        """Store files of which some are hard links to files of another artifact, as ``take``.

        The linked files are not read: their hashes are in the manifest of the other artifact.

        Args:
            folder: the folder of the files.
            parent: the other artifact.
            parent_folder: its files, as ``local`` returned them.

        Raises:
            StoreRefused, ConcurrentChange: as ``put``.
            ArtifactMissing, ArtifactDamaged: as ``manifest``, for the other artifact.
        """
        known = self.manifest(parent)
        linked: dict[str, FileEntry] = {}
        if known.chunk_bytes == CHUNK_BYTES:
            linked = hard_links(folder, parent_folder, {one.path: one for one in known.files})
        files = regular_files(folder)
        entries = hashed(folder, [item for item in files if item[0] not in linked])
        entries += tuple(one.model_copy(update={"path": path}) for path, one in linked.items())
        manifest = StoreManifest.of(tuple(sorted(entries, key=lambda entry: entry.path)))
        return self._store(folder, manifest, move=True)

    def _store(self, folder: Path, manifest: StoreManifest, *, move: bool) -> Artifact:
        if found := self.find(manifest.root):
            return found
        manifest = manifest.with_blobs()
        add_files(self._place, folder, manifest, move=move)
        # If another writer has stored the same content, the result is the same.
        with suppress(AlreadyThere):
            key = f"artifacts/{manifest.root}/manifest.json"
            self._place.create(key, manifest.model_dump_json().encode())
        return self._named(manifest)

    def find(self, sha256: str) -> Artifact | None:
        """Return the artifact of this name; None if it does not exist or is incomplete."""
        try:
            return self._named(self._manifest(sha256))
        except ArtifactMissing:
            return None

    def artifact(self, uri: str) -> Artifact:
        """Return the artifact of this store that a URI refers to.

        Only the hash is used, not the root in the URI: a store may have been moved, and contents
        are verified against the hash. Nothing outside this store is read.

        Raises:
            ArtifactMissing: there is no complete artifact under this name.
            StoreRefused: the URI is not of the form ``[<root>/]artifacts/<sha256>``.
        """
        name = _name_in(uri)
        try:
            return self._named(self._manifest(name))
        except ArtifactMissing as fault:
            if uri.startswith((f"{self.root}/", "artifacts/")):
                raise
            raise ArtifactMissing(
                "artifact_in_other_store", uri=shown(uri), store=self.root
            ) from fault

    def uri_of(self, artifact: Artifact) -> str:
        """Return the full URI of an artifact in this store, for people and other programs."""
        return f"{self.root}/artifacts/{artifact.sha256}"

    def file_uri(self, artifact: Artifact, path: str) -> str:
        """Return the full URI of one file of an artifact in this store.

        Raises:
            ArtifactMissing, ArtifactDamaged: as ``manifest``; also there is no such file in it.
        """
        manifest = self.manifest(artifact)
        entry = _entry(artifact, manifest, path)
        in_place = self._in_place(manifest) is not None
        files = ArtifactFiles(self._place, manifest, in_place=in_place)
        return f"{self.root}/{files.key(entry)}"

    def reference(self, artifact: Artifact) -> str:
        """Return the reference to record outside the store: a full URI only for a bucket.

        A folder may be moved or mounted elsewhere, together with the records that refer to it.
        """
        return artifact.uri if self.folder is not None else self.uri_of(artifact)

    def scratch(self, cache: Path) -> Path:
        """Return a folder for temporary files on the disk of the folders of ``local``.

        Files in it can be hard links to files of artifacts.
        """
        return cache if self.folder is None else self.folder / TEMPORARY

    @property
    def folder(self) -> Path | None:
        """Return the folder of this store, if it is on this machine."""
        return self._place.in_place("")

    def manifest(self, artifact: Artifact) -> StoreManifest:
        """Read the manifest of an artifact, verified against its name.

        Raises:
            ArtifactMissing: it has no manifest, so it does not exist.
            ArtifactDamaged: the manifest does not match the artifact's name.
        """
        if _name_in(artifact.uri) != artifact.sha256:
            raise ArtifactDamaged("artifact_names_differ", uri=artifact.uri, sha256=artifact.sha256)
        manifest = self._manifest(artifact.sha256)
        if manifest.bytes != artifact.bytes:
            raise ArtifactDamaged(
                "artifact_size_differs",
                uri=self.uri_of(artifact),
                expected=artifact.bytes,
                got=manifest.bytes,
            )
        return manifest

    def get(self, artifact: Artifact, into: Path) -> Path:
        """Copy an artifact's files to a folder, every chunk verified. All or nothing.

        Args:
            artifact: the artifact to copy.
            into: must not exist, or be an empty folder.

        Raises:
            ArtifactMissing, ArtifactDamaged: as ``manifest``; also a file or chunk is damaged.
            StoreRefused: ``into`` is not empty.
        """
        must_be_free(into)
        manifest = self.manifest(artifact)
        with folder_next_to(into) as partial:
            ArtifactFiles(self._place, manifest).copy(partial)
            try:
                partial.rename(into)  # replaces an empty folder, fails on any other
            except OSError as fault:
                must_be_free(into)
                raise translate(fault, into, "write") from fault
        return into

    def local(self, artifact: Artifact, cache: Path) -> Path:
        """Return a verified local folder to memory-map; treat it as read-only.

        For a folder store that is the folder of the artifact's links. For S3, and for a folder
        that was copied from a bucket, it is a copy at ``cache/<sha256>``, verified on every call
        and fetched again if it is damaged.
        """
        manifest = self.manifest(artifact)
        place = self._in_place(manifest)
        if place is not None:
            ArtifactFiles(self._place, manifest, in_place=True).verify()
            return place
        kept = cache / artifact.sha256
        for _ in range(2):
            if _is_intact(kept, manifest):
                return kept
            drop_folder(kept)
            try:
                return self.get(artifact, kept)
            except Refused:
                if not kept.exists():
                    raise  # otherwise another process created the copy: verify it
        raise ConcurrentChange("cache_changing", path=str(kept))

    def file(self, artifact: Artifact, path: str) -> bytes:
        """Read one small file of an artifact, with its chunks verified; at most a manifest's size.

        Raises:
            ArtifactMissing, ArtifactDamaged: as ``manifest``; also there is no such file in it.
        """
        manifest = self.manifest(artifact)
        entry = _entry(artifact, manifest, path)
        if entry.bytes > MAX_MANIFEST_BYTES:
            raise ArtifactMissing("artifact_file_large", uri=artifact.uri, path=path)
        return b"".join(ArtifactFiles(self._place, manifest).chunks((entry,)))

    def chunks(self, artifact: Artifact, path: str) -> Iterator[bytes]:
        """Yield the chunks of one file of an artifact in order, each verified.

        Raises:
            ArtifactMissing, ArtifactDamaged: as ``file``, for any size.
        """
        manifest = self.manifest(artifact)
        entry = _entry(artifact, manifest, path)
        return ArtifactFiles(self._place, manifest).chunks((entry,))

    def create(self, key: str, body: bytes) -> None:
        """Write a small record unless its key exists; atomic with its content.

        Raises:
            AlreadyThere: the key exists, also if another process has just created it.
        """
        self._place.create(_record_key(key, body), body)

    def read(self, key: str) -> bytes:
        """Read a small record (up to 16 MiB).

        Raises:
            ArtifactMissing: there is no such key.
        """
        return self._whole(_checked_key(key), MAX_RECORD_BYTES)

    def write(self, key: str, body: bytes) -> None:
        """Write or replace a small record; readers receive the old one or the new one."""
        self._place.write(_record_key(key, body), body)

    def keys(self, prefix: str) -> tuple[str, ...]:
        """List every key that begins with ``prefix``, relative to the root, sorted."""
        return tuple(sorted(self.sizes(prefix)))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the keys of ``keys`` with their sizes in bytes, unsorted."""
        if prefix:
            _checked_key(prefix.rstrip("/"))
        return self._place.sizes(prefix)

    def checked(self, read: Callable[[], Checked]) -> Checked:
        """Read verified content; retry once if a bucket's response does not verify.

        Args:
            read: reads and verifies; raises ``ArtifactDamaged``.
        """
        return checked(self._place, read)

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a file of any size to a key; if ``chunks`` raises, the key is unchanged."""
        self._place.upload(_record_key(key, b""), size, chunks)

    def holds(self, key: str, entry: FileEntry, chunk_bytes: int = CHUNK_BYTES) -> bool:
        """Return whether a key has exactly the bytes of this file; reads all of them."""
        return holds(self._place, _checked_key(key), entry, chunk_bytes)

    def _in_place(self, manifest: StoreManifest) -> Path | None:
        """Return the folder in which readers open an artifact's files; None if there is none."""
        folder = self._place.in_place(files_below(manifest.root).rstrip("/"))
        has_links = manifest.schema_version == 1 or (folder is not None and folder.exists())
        return folder if has_links else None

    def _named(self, manifest: StoreManifest) -> Artifact:
        uri = f"artifacts/{manifest.root}"
        return Artifact(uri=uri, sha256=manifest.root, bytes=manifest.bytes)

    def _manifest(self, name: str) -> StoreManifest:
        if not _SHA256.fullmatch(name):
            raise StoreRefused("artifact_name_form", got=short(name))
        return self.checked(lambda: self._read_manifest(name))

    def _read_manifest(self, name: str) -> StoreManifest:
        uri = f"{self.root}/artifacts/{name}"
        try:
            body = self._whole(f"artifacts/{name}/manifest.json", MAX_MANIFEST_BYTES)
        except ArtifactMissing as fault:
            raise ArtifactMissing("artifact_missing", uri=uri) from fault
        try:
            manifest = validated(StoreManifest, body, MAX_MANIFEST_BYTES)
        except ValidationError as fault:
            first = fault.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            problem = f"{where}: {first['msg']}"
            raise ArtifactDamaged("manifest_unusable", uri=uri, problem=problem) from fault
        except ValueError as fault:
            raise ArtifactDamaged("manifest_unusable", uri=uri, problem=str(fault)) from fault
        if not name == manifest.root == root_of(manifest.files, manifest.chunk_bytes):
            raise ArtifactDamaged("manifest_changed", uri=uri)
        return manifest

    def _whole(self, key: str, limit: int) -> bytes:
        body = self._place.read(key, 0, limit + 1)
        if len(body) > limit:
            raise RecordRefused("record_too_large", place=f"{self.root}/{key}", most_bytes=limit)
        return body


def _name_in(uri: str) -> str:
    name = artifact_name(uri)
    if name is None:
        raise StoreRefused("artifact_uri_form", got=shown(uri))
    return name


def _entry(artifact: Artifact, manifest: StoreManifest, path: str) -> FileEntry:
    entry = next((entry for entry in manifest.files if entry.path == path), None)
    if entry is None:
        raise ArtifactMissing("artifact_file_missing", uri=artifact.uri, path=path)
    return entry


def _checked_key(key: str) -> str:
    try:
        return plain_path(key)
    except ValueError as fault:
        raise StoreRefused("key_form", problem=str(fault)) from fault


def _record_key(key: str, body: bytes) -> str:
    if key.partition("/")[0] in {"artifacts", BLOBS, TEMPORARY}:
        raise StoreRefused("key_reserved", key=key)
    if len(body) > MAX_RECORD_BYTES:
        raise StoreRefused("record_too_large", key=key, size=len(body), most_bytes=MAX_RECORD_BYTES)
    return _checked_key(key)


def _is_intact(folder: Path, manifest: StoreManifest) -> bool:
    """Return whether a cached copy is complete and unchanged; False if it cannot be read."""
    try:
        return hashed(folder, regular_files(folder), manifest.chunk_bytes) == manifest.files
    except (Refused, InfraError):
        return False
