"""The bundle format: a folder with ``model.json``, ``*.safetensors`` and nothing else.

Reading a bundle executes no code: JSON and safetensors are data, and any other file is refused.
``model.json`` lists every other file with its size and SHA-256. Its last line, the seal, is the
SHA-256 of the bytes before that line, so any changed byte is detected. The seal is not a signature:
a person who rewrites all files can also reseal them. The artifact hash of the object store
identifies the bundle.
"""

import difflib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from compressors.contracts import Artifact, DenseInput, Frozen, Network, Plan, Sha256, Signature
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from infra.bundle.json_limits import AnyModel
from infra.bundle.json_reader import clean, decode, parse, plain, read_json, refuse_if, short
from infra.bundle.paths import DraftPath, FileName, InsidePath
from infra.bundle.schema_versions import (
    SCHEMA_VERSION,
    VERSION_1_PLACES,
    migrate,
    require_known_version,
)
from infra.bundle.shards import (
    BLOCK_BYTES,
    INDEX,
    StoredTensor,
    TensorFact,
    draft_file_problem,
    listing,
    nonfinite_problem,
    pickle_problem,
    stored_tensors,
    tensor_files,
)
from infra.errors import BundleRefused
from infra.printable import bounded

__all__ = [
    "SCHEMA_VERSION",
    "MANIFEST",
    "INDEX",
    "DataReference",
    "Draft",
    "FileRecord",
    "Manifest",
    "SplitName",
    "TensorFact",
    "read_draft",
    "seal",
    "seal_again",
    "read",
    "check_weights",
    "table_rows",
    "tensor_files",
]

MANIFEST = "model.json"
MAX_DIMENSIONS_SHOWN = 8
"""Of a shape in an error: a header may list thousands."""


# --- fields of model.json --------------------------------------------------------------------


SplitName = Literal["train", "calibration", "validation", "test", "items", "traffic"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class FileRecord(Frozen):
    """Size and SHA-256 of one file when the bundle was sealed."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class DataReference(Frozen):
    """One part of the data: a parquet file, or a folder of them, inside an artifact."""

    artifact: Artifact
    file: InsidePath
    rows: int = Field(ge=0)


class Manifest(Frozen):
    """A sealed bundle's ``model.json``."""

    schema_version: Literal[2]
    name: Name
    version: Version
    signature: Signature
    network: Network
    data: dict[SplitName, DataReference]
    vocabularies: dict[InsidePath, Artifact] = Field(default_factory=dict)
    transforms: dict[InsidePath, Artifact] = Field(default_factory=dict)
    files: dict[FileName, FileRecord]
    parents: tuple[Artifact, ...] = ()
    plan: Plan | None = None
    notes: tuple[str, ...] = Field((), description="What to know about how the class is built.")

    @field_validator("files")
    @classmethod
    def _other_files(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        if MANIFEST in files:
            raise value_error("manifest_hashes_itself", manifest=MANIFEST)
        return files


class Draft(Frozen):
    """What a user writes as ``model.json``: paths where the manifest has artifacts.

    Paths are relative to the draft's folder, or absolute: ``folder / path`` is right for both.
    """

    schema_version: Literal[2]
    name: Name
    version: Version
    signature: Signature
    network: Network
    data: dict[SplitName, DraftPath]
    vocabularies: dict[InsidePath, DraftPath] = Field(default_factory=dict)
    transforms: dict[InsidePath, DraftPath] = Field(default_factory=dict)


# --- reading and sealing ---------------------------------------------------------------------


def read_draft(folder: Path) -> Draft:
    """Read a user's ``model.json`` and run every check that needs no object store.

    Raises:
        BundleRefused: the draft, its weights' headers or the paths in it are unusable.
    """
    refuse_if(folder, (p for path in listing(folder) if (p := draft_file_problem(path))))
    _, document = read_json(folder / MANIFEST)
    require_known_version(document, folder / MANIFEST)
    if "seal" in document or "files" in document:
        raise BundleRefused("already_sealed", folder=str(folder))
    draft = _parsed(Draft, document, folder / MANIFEST)
    stored_tensors(folder)
    sections: tuple[tuple[str, Mapping[Any, str]], ...] = (
        ("data", draft.data),
        ("vocabularies", draft.vocabularies),
        ("transforms", draft.transforms),
    )
    places = ((f"{name}.{key}", text) for name, part in sections for key, text in part.items())
    refuse_if(folder, (p for where, text in places if (p := _unusable(folder, where, text))))
    return draft


def seal(
    folder: Path,
    *,
    name: str,
    version: str,
    signature: Signature,
    network: Network,
    data: Mapping[SplitName, DataReference],
    vocabularies: Mapping[str, Artifact] | None = None,
    transforms: Mapping[str, Artifact] | None = None,
    parents: Sequence[Artifact] = (),
    plan: Plan | None = None,
    notes: Sequence[str] = (),
    linked: Mapping[str, FileRecord] | None = None,
) -> Manifest:
    """Hash every file in ``folder`` and write ``model.json``, whole or not at all.

    The weights must already be in the folder: shards, and their index if there are several. An
    existing ``model.json`` is replaced. Returns the same manifest as ``read``. Files in ``linked``
    are not read: they are hard links to files of a verified bundle, with these records.

    Raises:
        BundleRefused: the folder holds a file that a bundle may not have, or the fields are
            inconsistent.
    """
    partial = folder / f"{MANIFEST}.partial"
    names = _names(folder, leave=partial.name) - {MANIFEST}  # a killed run may have left one
    stored_tensors(folder)
    records = linked or {}
    fields = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "version": version,
        "signature": signature,
        "network": network,
        "data": dict(data),
        "vocabularies": dict(vocabularies or {}),
        "transforms": dict(transforms or {}),
        "files": {
            item: records[item] if item in records else _record(folder / item)
            for item in sorted(names)
        },
        "parents": tuple(parents),
        "plan": plan,
        "notes": tuple(notes),
    }
    checked = parse(Manifest, fields, folder / MANIFEST)
    try:
        # Without notes the JSON has no such field, so the hashes of older bundles do not change.
        document = checked.model_dump(exclude=set() if checked.notes else {"notes"})
        text = json.dumps(plain(document), indent=2)
    except (ValueError, RecursionError) as fault:
        raise BundleRefused(
            "settings_not_json", folder=str(folder), problem=clean(fault)
        ) from fault
    body = text.removesuffix("\n}").encode() + b",\n"
    raw = body + _seal_line(body)
    manifest = manifest_of(raw, folder)
    with partial.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)
    return manifest


def seal_again(folder: Path, manifest: Manifest) -> Manifest:
    """Seal other files of a bundle, as ``seal``; only ``files`` differs from its manifest."""
    kept = {name: getattr(manifest, name) for name in type(manifest).model_fields}
    return seal(folder, **{name: kept[name] for name in kept.keys() - {"schema_version", "files"}})


def read(folder: Path) -> Manifest:
    """Read a sealed bundle and verify every byte of it.

    Raises:
        BundleRefused: anything in the folder is missing, extra, changed, unsafe or malformed.
    """
    if not folder.is_dir() or folder.is_symlink():
        _names(folder)  # raises with the reason if it cannot be read
    raw, _ = read_json(folder / MANIFEST)
    manifest = manifest_of(raw, folder)  # first, so that a draft is not reported as a broken bundle
    names = _names(folder)
    refuse_if(folder, _differences(folder, names - {MANIFEST}, manifest.files))
    stored_tensors(folder)
    return manifest


def manifest_of(raw: bytes, folder: Path) -> Manifest:
    """Parse a sealed bundle's ``model.json`` without reading the files it lists.

    Args:
        raw: bytes of ``model.json``.
        folder: its folder, for the error message.

    Raises:
        BundleRefused: it is a draft, malformed, of an unknown version, or changed after sealing.
    """
    path = folder / MANIFEST
    document = decode(raw, path)
    require_known_version(document, path)
    if "seal" not in document and "files" not in document:
        raise BundleRefused("is_draft", folder=str(folder))
    manifest = _parsed(Manifest, _without_seal(document), path, stored=True)
    tail = len(_seal_line(b""))
    if raw[-tail:] != _seal_line(raw[:-tail]):
        raise BundleRefused("seal_differs", path=str(path))
    return manifest


def check_weights(folder: Path, manifest: Manifest) -> dict[str, TensorFact]:
    """Check that every weight is finite and every tie refers to a stored tensor.

    Reads block by block, so memory stays flat for any size.

    Returns:
        ``TensorFact`` (shape, dtype, bytes) of every stored tensor, by name.

    Raises:
        BundleRefused: NaN or infinite weights, or ties or an index that do not match the shards.
    """
    found = stored_tensors(folder)
    buffer = bytearray(BLOCK_BYTES)
    problems = (nonfinite_problem(name, stored, buffer) for name, stored in found.items())
    refuse_if(folder, (problem for problem in problems if problem))
    refuse_if(folder, _tie_problems(manifest.network.ties, found))
    return {name: stored.fact for name, stored in found.items()}


def table_rows(facts: Mapping[str, TensorFact], manifest: Manifest) -> dict[str, int]:
    """Return the number of rows of every table that an input names: plain, tied or compressed.

    Raises:
        BundleRefused: an input names a table that the weights do not have.
    """
    network = manifest.network
    tables = [name.removesuffix(".weight") for name, fact in facts.items() if len(fact.shape) == 2]
    rows: dict[str, int] = {}
    problems: list[Reason] = []
    for item in manifest.signature.inputs:
        if isinstance(item, DenseInput):
            continue
        name, table = short(item.name), short(item.table)
        record = network.modules.get(item.table)
        weight = f"{item.table}.weight"
        fact = facts.get(network.ties.get(weight, weight))
        if record is not None:
            count = record.settings.get("rows")
            if record.kind == "linear" or type(count) is not int or count < 1:
                problems.append(
                    Reason(
                        "table_record_unusable",
                        input=name,
                        table=table,
                        kind=record.kind,
                        rows=short(count),
                    )
                )
            else:
                rows[item.table] = count
        elif fact is None or len(fact.shape) != 2:
            near = _near(item.table, [*tables, *network.modules])
            problems.append(
                Reason(
                    "table_not_stored",
                    input=name,
                    table=table,
                    weight=short(weight),
                    near=near,
                )
                if fact is None
                else Reason(
                    "table_shape",
                    input=name,
                    table=table,
                    weight=short(weight),
                    shape=fact.shape[:MAX_DIMENSIONS_SHOWN],
                    near=near,
                )
            )
        else:
            rows[item.table] = fact.shape[0]
    refuse_if("Inputs and weights do not fit", problems)
    return rows


def _tie_problems(ties: Mapping[str, str], found: Mapping[str, StoredTensor]) -> Iterator[Reason]:
    for alias, target in ties.items():
        if target not in found:
            yield Reason(
                "tie_not_stored",
                alias=short(alias),
                target=short(target),
                near=_near(target, found),
            )
        if alias in found:
            yield Reason("tie_stored_too", alias=short(alias))


def _near(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names most similar to a missing one, or the first few."""
    known = list(islice(names, 2000))  # comparing is slow, and this is only a hint
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]
    return tuple(map(short, close))


# --- files -----------------------------------------------------------------------------------


def _names(folder: Path, leave: str = "") -> set[str]:
    """List the names in a bundle's folder; raises for any file a bundle may not have."""
    problems: list[Reason] = []
    names: set[str] = set()
    for path in listing(folder):
        if path.name == leave:
            continue
        mode = path.lstat().st_mode
        names.add(path.name)
        file = short(path.name)
        if stat.S_ISLNK(mode):
            problems.append(Reason("file_is_link", file=file))
        elif stat.S_ISDIR(mode):
            problems.append(Reason("file_is_folder", file=file))
        elif not stat.S_ISREG(mode):
            problems.append(Reason("file_is_special", file=file))
        elif problem := pickle_problem(path):
            problems.append(problem)
        elif path.name not in (MANIFEST, INDEX) and path.suffix != ".safetensors":
            problems.append(Reason("file_of_other_kind", file=file, manifest=MANIFEST, index=INDEX))
    refuse_if(folder, problems)
    return names


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(sha256=sha256, bytes=file.tell())


def _differences(
    folder: Path, names: set[str], records: Mapping[str, FileRecord]
) -> Iterator[Reason]:
    """Return the differences between a folder and its manifest; hashes one file after another."""
    for name in sorted(records.keys() - names):
        yield Reason("file_missing", file=short(name))
    for name in sorted(names - records.keys()):
        yield Reason("file_unlisted", file=short(name), manifest=MANIFEST)
    for name in sorted(names & records.keys()):
        size = (folder / name).stat().st_size
        if size != (wanted := records[name]).bytes:
            yield Reason("file_size_differs", file=short(name), got=size, expected=wanted.bytes)
        elif (found := _record(folder / name).sha256) != wanted.sha256:
            yield Reason("file_hash_differs", file=short(name), got=found, expected=wanted.sha256)


def _unusable(folder: Path, entry: str, text: str) -> Reason | None:
    """Return why a draft's path cannot be used, or None."""
    path, entry, shown = folder / text, bounded(entry), short(text)
    try:
        there = path.exists()
    except OSError as fault:
        return Reason("draft_path_unreadable", entry=entry, path=shown, problem=clean(fault))
    if not there:
        folder_name = bounded(str(folder))
        return Reason("draft_path_missing", entry=entry, path=shown, folder=folder_name)
    if folder.resolve().is_relative_to(path.resolve()):
        return Reason("draft_path_holds_draft", entry=entry, path=shown)
    if not Path(text).is_absolute() and not path.resolve().is_relative_to(folder.resolve()):
        return Reason("draft_path_outside", entry=entry, path=shown)
    return None


def _parsed(
    kind: type[AnyModel], document: Mapping[str, Any], path: Path, *, stored: bool = False
) -> AnyModel:
    """Validate a document of any known version; errors name places in the document as it is."""
    places = VERSION_1_PLACES if document["schema_version"] == 1 else {}
    return parse(kind, migrate(document), path, stored=stored, places=places)


def _without_seal(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "seal"}


def _seal_line(body: bytes) -> bytes:
    return f'  "seal": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
