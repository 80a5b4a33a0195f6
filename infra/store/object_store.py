"""The object store: content-addressed, verified artifacts in a folder or ``s3://bucket/prefix``.

::

    <root>/blobs/<sha256>                     a file, shared by all artifacts that have it
    <root>/artifacts/<sha256>/manifest.json   written last; without it the artifact does not exist
    <root>/artifacts/<sha256>/files/...       only if root is a folder: hard links to the blobs
    <root>/<key>                              small records, such as promotions and reports

The hard links let readers memory-map the files of an artifact by path. An artifact whose manifest
has version 1 has no blobs: its files are stored below ``files``, in a folder and in a bucket.

``manifest.py`` defines the manifest, ``chunks.py`` reads and hashes files, ``backend.py`` is the
protocol of a key-value storage backend, ``folder.py`` and ``s3.py`` are its two implementations,
and ``artifact_files.py`` writes and reads the files of artifacts.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from compressors.contracts import Artifact, artifact_name
from infra.bundle.json_limits import validate_json
from infra.bundle.json_reader import shorten
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
from infra.settings import public_uri
from infra.store.artifact_files import (
    BLOBS,
    ArtifactFiles,
    add_files,
    build_files_prefix,
    has_content,
    read_with_retry,
)
from infra.store.backend import create_backend
from infra.store.chunks import find_hard_links, hash_files, list_regular_files
from infra.store.disk import translate_os_error
from infra.store.folder import TEMPORARY, require_empty_or_missing
from infra.store.manifest import (
    CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    FileEntry,
    StoreManifest,
    compute_root,
    require_portable_path,
)
from infra.store.temporary import drop_folder, folder_next_to

__all__ = ["CHUNK_BYTES", "MAX_RECORD_BYTES", "FileEntry", "Store", "StoreManifest"]

MAX_RECORD_BYTES = 16 * 2**20

Content = TypeVar("Content")

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Store:
    """Stores artifacts under the hash of their content, and small records under keys.

    Args:
        root: a folder, ``file:///folder`` or ``s3://bucket/prefix``. No connection or folder is
            created before the first read or write.
        setting: name of the variable or option that contains ``root``, for the error message.

    Raises:
        SettingRefused: ``root`` has none of these forms.

    Every method that reads or writes may also raise ``StoreUnavailable`` (a retry may help) or
    ``SettingRefused`` (credentials, bucket or permissions are wrong).
    """

    def __init__(self, root: str, setting: str = "RECPRESS_STORE") -> None:
        self._backend = create_backend(root, setting)
        self.root = self._backend.uri

    def put(self, folder: Path) -> Artifact:
        """Copy every file below ``folder`` to the store, unless the store has the same content.

        Returns:
            The artifact that contains these files.

        Raises:
            StoreRefused: the folder is missing or empty, or contains a symlink or a device.
            ConcurrentChange: a file changed while it was being stored. No artifact was created.
        """
        manifest = StoreManifest.of(hash_files(folder, list_regular_files(folder)))
        return self._store(folder, manifest, move=False)

    def take(self, folder: Path, manifest: StoreManifest | None = None) -> Artifact:
        """Store the files of ``folder`` and give them up: the caller must not use them afterwards.

        If the store is a folder on the same disk, the files are moved; otherwise they are copied.

        Args:
            folder: the folder that contains the files.
            manifest: their hashes, as ``ArtifactWriter.seal`` returns them; None to compute them.

        Raises:
            StoreRefused, ConcurrentChange: ``put`` cannot store the files.
        """
        if manifest is None:
            manifest = StoreManifest.of(hash_files(folder, list_regular_files(folder)))
        return self._store(folder, manifest, move=True)

    def take_derived(self, folder: Path, parent: Artifact, parent_folder: Path) -> Artifact:
        """Store files as ``take``, but do not hash hard links to files of ``parent``.

        The hashes of linked files are copied from the manifest of ``parent``.

        Args:
            folder: the folder that contains the files.
            parent: the artifact that some files link to.
            parent_folder: the folder that ``local`` returned for ``parent``.

        Raises:
            StoreRefused, ConcurrentChange: ``put`` cannot store the files.
            ArtifactMissing, ArtifactDamaged: the parent's manifest is missing or damaged.
        """
        parent_manifest = self.manifest(parent)
        linked: dict[str, FileEntry] = {}
        if parent_manifest.chunk_bytes == CHUNK_BYTES:
            parent_entries = {entry.path: entry for entry in parent_manifest.files}
            linked = find_hard_links(folder, parent_folder, parent_entries)
        files = list_regular_files(folder)
        entries = hash_files(folder, [(path, size) for path, size in files if path not in linked])
        entries += tuple(entry.model_copy(update={"path": path}) for path, entry in linked.items())
        manifest = StoreManifest.of(tuple(sorted(entries, key=lambda entry: entry.path)))
        return self._store(folder, manifest, move=True)

    def _store(self, folder: Path, manifest: StoreManifest, *, move: bool) -> Artifact:
        """Store the files of a version 1 manifest and then the manifest, as version 2."""
        if stored := self.find(manifest.root):
            return stored
        manifest = manifest.add_blobs()
        add_files(self._backend, folder, manifest, move=move)
        with suppress(AlreadyThere):  # another writer has stored the same content
            key = f"artifacts/{manifest.root}/manifest.json"
            self._backend.create(key, manifest.model_dump_json().encode())
        return self._build_artifact(manifest)

    def find(self, sha256: str) -> Artifact | None:
        """Return the artifact whose name is this hash; None if it is missing or incomplete."""
        try:
            return self._build_artifact(self._manifest(sha256))
        except ArtifactMissing:
            return None

    def artifact(self, uri: str) -> Artifact:
        """Return the artifact of this store whose hash is in ``uri``.

        The root in the URI is ignored, because the store may have been moved and the hash is
        enough to verify the content. Nothing outside this store is read.

        Raises:
            ArtifactMissing: this store has no complete artifact with this hash.
            StoreRefused: the URI is not of the form ``[<root>/]artifacts/<sha256>``.
        """
        name = _parse_artifact_name(uri)
        try:
            return self._build_artifact(self._manifest(name))
        except ArtifactMissing as fault:
            if uri.startswith((f"{self.root}/", "artifacts/")):
                raise
            raise ArtifactMissing(
                "artifact_in_other_store", uri=public_uri(uri), store=self.root
            ) from fault

    def uri_of(self, artifact: Artifact) -> str:
        """Return the full URI of an artifact in this store, for people and other programs."""
        return f"{self.root}/artifacts/{artifact.sha256}"

    def file_uri(self, artifact: Artifact, path: str) -> str:
        """Return the full URI of one file of an artifact in this store.

        Raises:
            ArtifactMissing, ArtifactDamaged: the manifest is missing or damaged, or the artifact
                has no such file.
        """
        manifest = self.manifest(artifact)
        entry = _find_entry(artifact, manifest, path)
        use_links = self._find_links_folder(manifest) is not None
        files = ArtifactFiles(self._backend, manifest, use_links=use_links)
        return f"{self.root}/{files.key(entry)}"

    def reference(self, artifact: Artifact) -> str:
        """Return the URI that other systems, such as the registry, record for an artifact.

        For a bucket it is the full URI. For a folder it is relative to the root, because the
        folder may be moved together with the records that refer to it.
        """
        return artifact.uri if self.folder is not None else self.uri_of(artifact)

    def scratch(self, cache: Path) -> Path:
        """Return a folder for temporary files, on the same disk as the folders of ``local``.

        So files in it can be hard links to files of an artifact.
        """
        return cache if self.folder is None else self.folder / TEMPORARY

    @property
    def folder(self) -> Path | None:
        """The local folder that is the root of this store; None for a bucket."""
        return self._backend.local_path("")

    def manifest(self, artifact: Artifact) -> StoreManifest:
        """Read the manifest of an artifact and verify that it matches the artifact's hash.

        Raises:
            ArtifactMissing: the artifact has no manifest, so it does not exist.
            ArtifactDamaged: the manifest does not match the hash or the size of the artifact.
        """
        if _parse_artifact_name(artifact.uri) != artifact.sha256:
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
        """Copy an artifact's files to a folder and verify every chunk; on failure, leave no files.

        Args:
            artifact: the artifact to copy.
            into: a folder that is empty or does not exist yet.

        Returns:
            ``into``.

        Raises:
            ArtifactMissing, ArtifactDamaged: the manifest or a file is missing or damaged.
            StoreRefused: ``into`` is not empty.
        """
        require_empty_or_missing(into)
        manifest = self.manifest(artifact)
        with folder_next_to(into) as partial:
            ArtifactFiles(self._backend, manifest).copy(partial)
            try:
                partial.rename(into)  # replaces an empty folder, fails on any other
            except OSError as fault:
                require_empty_or_missing(into)
                raise translate_os_error(fault, into, "write") from fault
        return into

    def local(self, artifact: Artifact, cache: Path) -> Path:
        """Return a local folder with the verified files of an artifact; callers must not write it.

        If the store is a folder, the result is the artifact's folder of hard links. If there is no
        such folder (the store is a bucket, or was copied from one), the result is a copy at
        ``cache/<sha256>``: every call verifies the copy and fetches it again if it is damaged.

        Raises:
            ArtifactMissing, ArtifactDamaged: the manifest or a file is missing or damaged.
            ConcurrentChange: other processes keep changing the copy.
        """
        manifest = self.manifest(artifact)
        folder = self._find_links_folder(manifest)
        if folder is not None:
            ArtifactFiles(self._backend, manifest, use_links=True).verify()
            return folder
        cached_copy = cache / artifact.sha256
        for _ in range(2):  # a second time if another process changes the copy
            if _is_intact(cached_copy, manifest):
                return cached_copy
            drop_folder(cached_copy)
            try:
                return self.get(artifact, cached_copy)
            except Refused:
                if not cached_copy.exists():
                    raise  # otherwise another process created the copy: verify it
        raise ConcurrentChange("cache_changing", path=str(cached_copy))

    def file(self, artifact: Artifact, path: str) -> bytes:
        """Read and verify one file of an artifact; it has at most ``MAX_MANIFEST_BYTES``.

        Raises:
            ArtifactMissing, ArtifactDamaged: the manifest or the file is missing or damaged, or the
                file is larger.
        """
        manifest = self.manifest(artifact)
        entry = _find_entry(artifact, manifest, path)
        if entry.bytes > MAX_MANIFEST_BYTES:
            raise ArtifactMissing("artifact_file_large", uri=artifact.uri, path=path)
        return b"".join(ArtifactFiles(self._backend, manifest).read_chunks((entry,)))

    def chunks(self, artifact: Artifact, path: str) -> Iterator[bytes]:
        """Yield the verified chunks of one file of an artifact in order. The file has any size.

        Raises:
            ArtifactMissing, ArtifactDamaged: the manifest or the file is missing or damaged.
        """
        manifest = self.manifest(artifact)
        entry = _find_entry(artifact, manifest, path)
        return ArtifactFiles(self._backend, manifest).read_chunks((entry,))

    def create(self, key: str, body: bytes) -> None:
        """Write a new small record; readers see either no record or the complete one.

        Raises:
            AlreadyThere: the key exists. Of several concurrent calls exactly one succeeds.
            StoreRefused: the key is invalid or reserved, or the record exceeds 16 MiB.
        """
        self._backend.create(_validate_record(key, body), body)

    def read(self, key: str) -> bytes:
        """Read a small record.

        Raises:
            ArtifactMissing: the key does not exist.
            RecordRefused: the value exceeds 16 MiB or is not a plain file.
        """
        return self._read_bounded(_validate_key(key), MAX_RECORD_BYTES)

    def write(self, key: str, body: bytes) -> None:
        """Write or replace a small record; readers receive the old or the new one, complete."""
        self._backend.write(_validate_record(key, body), body)

    def keys(self, prefix: str) -> tuple[str, ...]:
        """List every key that begins with ``prefix``, relative to the root, sorted."""
        return tuple(sorted(self.sizes(prefix)))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of every key that begins with ``prefix``, unsorted."""
        if prefix:
            _validate_key(prefix.rstrip("/"))
        return self._backend.sizes(prefix)

    def read_with_retry(self, read: Callable[[], Content]) -> Content:
        """Call ``read``; if the store is a bucket, retry once after ``ArtifactDamaged``.

        A byte that changed in transit is correct in the second response.

        Args:
            read: reads and verifies content; raises ``ArtifactDamaged``.
        """
        return read_with_retry(self._backend, read)

    def upload(self, key: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write a file of any size to a key; if ``chunks`` raises, the key is unchanged."""
        self._backend.upload(_validate_record(key, b""), size, chunks)

    def has_content(self, key: str, entry: FileEntry, chunk_bytes: int = CHUNK_BYTES) -> bool:
        """Return whether the value of a key is exactly this file; reads and hashes all of it."""
        return has_content(self._backend, _validate_key(key), entry, chunk_bytes)

    def _find_links_folder(self, manifest: StoreManifest) -> Path | None:
        """Return the local folder with an artifact's files by path; None if there is none."""
        folder = self._backend.local_path(build_files_prefix(manifest.root).rstrip("/"))
        is_used = manifest.schema_version == 1 or (folder is not None and folder.exists())
        return folder if is_used else None

    def _build_artifact(self, manifest: StoreManifest) -> Artifact:
        """Return the artifact that a manifest describes, with a URI relative to the root."""
        uri = f"artifacts/{manifest.root}"
        return Artifact(uri=uri, sha256=manifest.root, bytes=manifest.bytes)

    def _manifest(self, name: str) -> StoreManifest:
        """Read and verify the manifest of an artifact by its hash."""
        if not _SHA256.fullmatch(name):
            raise StoreRefused("artifact_name_form", got=shorten(name))
        return self.read_with_retry(lambda: self._read_manifest(name))

    def _read_manifest(self, name: str) -> StoreManifest:
        """Read and verify the manifest of an artifact by its hash, without a retry."""
        uri = f"{self.root}/artifacts/{name}"
        try:
            body = self._read_bounded(f"artifacts/{name}/manifest.json", MAX_MANIFEST_BYTES)
        except ArtifactMissing as fault:
            raise ArtifactMissing("artifact_missing", uri=uri) from fault
        try:
            manifest = validate_json(StoreManifest, body, MAX_MANIFEST_BYTES)
        except ValidationError as fault:
            error = fault.errors()[0]
            location = ".".join(str(part) for part in error["loc"])
            problem = f"{location}: {error['msg']}"
            raise ArtifactDamaged("manifest_unusable", uri=uri, problem=problem) from fault
        except ValueError as fault:
            raise ArtifactDamaged("manifest_unusable", uri=uri, problem=str(fault)) from fault
        if not name == manifest.root == compute_root(manifest.files, manifest.chunk_bytes):
            raise ArtifactDamaged("manifest_changed", uri=uri)
        return manifest

    def _read_bounded(self, key: str, most_bytes: int) -> bytes:
        """Read the value of a key; raise ``RecordRefused`` if it is larger."""
        body = self._backend.read(key, 0, most_bytes + 1)
        if len(body) > most_bytes:
            place = f"{self.root}/{key}"
            raise RecordRefused("record_too_large", place=place, most_bytes=most_bytes)
        return body


def _parse_artifact_name(uri: str) -> str:
    """Return the hash in an artifact's URI; raise ``StoreRefused`` if there is none."""
    name = artifact_name(uri)
    if name is None:
        raise StoreRefused("artifact_uri_form", got=public_uri(uri))
    return name


def _find_entry(artifact: Artifact, manifest: StoreManifest, path: str) -> FileEntry:
    """Return the manifest's entry of a path; raise ``ArtifactMissing`` if there is none."""
    entry = next((entry for entry in manifest.files if entry.path == path), None)
    if entry is None:
        raise ArtifactMissing("artifact_file_missing", uri=artifact.uri, path=path)
    return entry


def _validate_key(key: str) -> str:
    """Return ``key`` if it is a plain relative path; raise ``StoreRefused`` otherwise."""
    try:
        return require_portable_path(key)
    except ValueError as fault:
        raise StoreRefused("key_form", problem=str(fault)) from fault


def _validate_record(key: str, body: bytes) -> str:
    """Return the key of a record to write; raise ``StoreRefused`` if it cannot be written."""
    if key.partition("/")[0] in {"artifacts", BLOBS, TEMPORARY}:
        raise StoreRefused("key_reserved", key=key)
    if len(body) > MAX_RECORD_BYTES:
        raise StoreRefused("record_too_large", key=key, size=len(body), most_bytes=MAX_RECORD_BYTES)
    return _validate_key(key)


def _is_intact(folder: Path, manifest: StoreManifest) -> bool:
    """Return whether a cached copy is complete and unchanged; False if it cannot be read."""
    try:
        files = list_regular_files(folder)
        return hash_files(folder, files, manifest.chunk_bytes) == manifest.files
    except (Refused, InfraError):
        return False
