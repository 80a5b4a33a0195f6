"""Read, validate and write bundles: folders with only ``model.json`` and ``*.safetensors``.

``Manifest`` has the fields of ``model.json``. The ``*.safetensors`` files are called shards. If
there are several, an index (``model.safetensors.index.json``) lists the shard of every tensor.

Reading a bundle executes no code: JSON and safetensors are data, and any other file is refused.
``model.json`` lists every other file with its size and SHA-256. Its last field, the seal, is the
SHA-256 of all bytes before its line, so any changed byte is detected. The seal is not a signature:
anyone can change a bundle and write a new seal. To identify a bundle, use the hash of its
artifact in the object store.
"""

import difflib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from compressors.contracts import Artifact, Network, Plan, Signature, all_tables
from compressors.contracts.reasons import Reason
from infra.bundle.json_limits import AnyModel
from infra.bundle.json_reader import (
    decode,
    escape_message,
    parse,
    raise_if_any,
    read_json,
    shorten,
    to_json_value,
)
from infra.bundle.model_json import MANIFEST, DataReference, Draft, FileRecord, Manifest, SplitName
from infra.bundle.schema_versions import (
    SCHEMA_VERSION,
    VERSION_1_LOCATIONS,
    migrate,
    require_known_version,
)
from infra.bundle.shards import (
    BLOCK_BYTES,
    INDEX,
    StoredTensor,
    TensorFact,
    draft_file_problem,
    list_folder,
    nonfinite_problem,
    pickle_problem,
    stored_tensors,
    tensor_files,
)
from infra.errors import BundleRefused
from infra.printable import truncate_sentence

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

MAX_DIMENSIONS_SHOWN = 8
"""Most dimensions of a shape in an error message; an invalid header may list thousands."""


def read_draft(folder: Path) -> Draft:
    """Read a user's ``model.json`` and run all checks that need no object store.

    Raises:
        BundleRefused: a field or path of the draft, or a header of its weights, cannot be used.
    """
    raise_if_any(folder, (p for path in list_folder(folder) if (p := draft_file_problem(path))))
    _, document = read_json(folder / MANIFEST)
    require_known_version(document, folder / MANIFEST)
    if "seal" in document or "files" in document:
        raise BundleRefused("already_sealed", folder=str(folder))
    draft = _migrate_and_parse(Draft, document, folder / MANIFEST)
    stored_tensors(folder)  # raises if a header is invalid
    path_fields: tuple[tuple[str, Mapping[Any, str]], ...] = (
        ("data", draft.data),
        ("vocabularies", draft.vocabularies),
        ("transforms", draft.transforms),
    )
    entries = ((f"{name}.{key}", text) for name, part in path_fields for key, text in part.items())
    raise_if_any(
        folder,
        (p for where, text in entries if (p := _find_draft_path_problem(folder, where, text))),
    )
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
    """Hash every file in ``folder`` and write ``model.json``, completely or not at all.

    The weights must already be in the folder: the shards and, if there are several, their index.
    An existing ``model.json`` is replaced.

    ``linked`` contains size and hash of files, by file name, that are hard links to files of a
    verified bundle; these files are not read. The other keyword arguments are fields of
    ``Manifest``.

    Returns:
        The manifest, equal to the result of ``read``.

    Raises:
        BundleRefused: the folder contains a file that a bundle may not have, or a field is invalid.
    """
    partial_file = folder / f"{MANIFEST}.partial"
    # A killed run may have left a partial file.
    names = _list_file_names(folder, ignored=partial_file.name) - {MANIFEST}
    stored_tensors(folder)  # raises if a header is invalid
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
            item: records[item] if item in records else hash_file(folder / item)
            for item in sorted(names)
        },
        "parents": tuple(parents),
        "plan": plan,
        "notes": tuple(notes),
    }
    unsealed = parse(Manifest, fields, folder / MANIFEST)
    try:
        # Without notes the field is omitted, as in bundles of versions that did not have it; so
        # their hashes do not change.
        document = unsealed.model_dump(exclude=set() if unsealed.notes else {"notes"})
        text = json.dumps(to_json_value(document), indent=2)
    except (ValueError, RecursionError) as fault:
        raise BundleRefused(
            "settings_not_json", folder=str(folder), problem=escape_message(fault)
        ) from fault
    body = text.removesuffix("\n}").encode() + b",\n"
    raw = body + _seal_line(body)
    manifest = parse_manifest(raw, folder)
    with partial_file.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    partial_file.replace(folder / MANIFEST)
    return manifest


def seal_again(folder: Path, manifest: Manifest) -> Manifest:
    """Write ``model.json`` again after files were changed, with the other fields unchanged.

    Args:
        folder: the folder with the changed files.
        manifest: the earlier manifest; all its fields except ``files`` and ``schema_version`` are
            copied.
    """
    names = type(manifest).model_fields.keys() - {"schema_version", "files"}
    return seal(folder, **{name: getattr(manifest, name) for name in names})


def read(folder: Path) -> Manifest:
    """Read a sealed bundle and verify every byte of its files.

    Raises:
        BundleRefused: a file in the folder is missing, extra, changed, unsafe or malformed.
    """
    if not folder.is_dir() or folder.is_symlink():
        _list_file_names(folder)  # raises with the reason if the folder cannot be read
    raw, _ = read_json(folder / MANIFEST)
    manifest = parse_manifest(raw, folder)  # first, so that a draft is reported as a draft
    names = _list_file_names(folder)
    raise_if_any(folder, _find_differences(folder, names - {MANIFEST}, manifest.files))
    stored_tensors(folder)  # raises if a header is invalid
    return manifest


def parse_manifest(raw: bytes, folder: Path) -> Manifest:
    """Parse the ``model.json`` of a sealed bundle without reading the files that it lists.

    Args:
        raw: content of ``model.json``.
        folder: the folder of the bundle, for the error message.

    Raises:
        BundleRefused: ``model.json`` is a draft, is malformed, has an unknown schema version, or
            does not match its seal.
    """
    path = folder / MANIFEST
    document = decode(raw, path)
    require_known_version(document, path)
    if "seal" not in document and "files" not in document:
        raise BundleRefused("is_draft", folder=str(folder))
    manifest = _migrate_and_parse(Manifest, _remove_seal(document), path, stored=True)
    seal_length = len(_seal_line(b""))
    if raw[-seal_length:] != _seal_line(raw[:-seal_length]):
        raise BundleRefused("seal_differs", path=str(path))
    return manifest


def check_weights(folder: Path, manifest: Manifest) -> dict[str, TensorFact]:
    """Check that all weights are finite and that all tied weights refer to stored tensors.

    Weights are read in blocks of 16 MiB, so memory does not grow with the size of the model.

    Returns:
        Shape, dtype and size of every stored tensor, by name.

    Raises:
        BundleRefused: a weight is NaN or infinite, or ties or the index do not match the shards.
    """
    tensors = stored_tensors(folder)
    buffer = bytearray(BLOCK_BYTES)
    problems = (nonfinite_problem(name, stored, buffer) for name, stored in tensors.items())
    raise_if_any(folder, (problem for problem in problems if problem))
    raise_if_any(folder, _find_tie_problems(manifest.network.ties, tensors))
    return {name: stored.fact for name, stored in tensors.items()}


def table_rows(facts: Mapping[str, TensorFact], manifest: Manifest) -> dict[str, int]:
    """Return the number of rows of every table that an input of the signature refers to.

    The weight of a table may be stored, tied to a stored weight, or stored in a compressed format.

    Args:
        facts: shape, dtype and size of the stored tensors by name, from ``check_weights``.
        manifest: the manifest of the bundle.

    Returns:
        Number of rows by the attribute path of the table's module.

    Raises:
        BundleRefused: an input refers to a table that the weights do not contain.
    """
    network = manifest.network
    tables = [name.removesuffix(".weight") for name, fact in facts.items() if len(fact.shape) == 2]
    rows: dict[str, int] = {}
    problems: list[Reason] = []
    uses = ((item, table) for item in manifest.signature.data_inputs for table in all_tables(item))
    for item, path in uses:
        name, table = shorten(item.name), shorten(path)
        record = network.modules.get(path)  # only a compressed table or layer has a record
        weight = f"{path}.weight"
        fact = facts.get(network.ties.get(weight, weight))
        if record is not None:
            count = record.settings.get("rows")
            # A dense layer ("linear") is no table, and a bool is no number of rows.
            if record.kind == "linear" or type(count) is not int or count < 1:
                problems.append(
                    Reason(
                        "table_record_unusable",
                        input=name,
                        table=table,
                        kind=record.kind,
                        rows=shorten(count),
                    )
                )
            else:
                rows[path] = count
        elif fact is None or len(fact.shape) != 2:
            similar = _find_similar_names(path, [*tables, *network.modules])
            problems.append(
                Reason(
                    "table_not_stored",
                    input=name,
                    table=table,
                    weight=shorten(weight),
                    near=similar,
                )
                if fact is None
                else Reason(
                    "table_shape",
                    input=name,
                    table=table,
                    weight=shorten(weight),
                    shape=fact.shape[:MAX_DIMENSIONS_SHOWN],
                    near=similar,
                )
            )
        else:
            rows[path] = fact.shape[0]
    raise_if_any("Inputs and weights do not fit", problems)
    return rows


def _find_tie_problems(
    ties: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> Iterator[Reason]:
    """Yield a reason for each tied weight whose target is not stored, or that is itself stored.

    Args:
        ties: name of the tied weight -> name of the weight that it shares.
        tensors: the stored tensors by name.
    """
    for alias, target in ties.items():
        if target not in tensors:
            yield Reason(
                "tie_not_stored",
                alias=shorten(alias),
                target=shorten(target),
                near=_find_similar_names(target, tensors),
            )
        if alias in tensors:
            yield Reason("tie_stored_too", alias=shorten(alias))


def _find_similar_names(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names most similar to a missing one; if none is similar, the first five."""
    known = list(islice(names, 2000))  # the comparison is slow and only gives a hint
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:5]
    return tuple(map(shorten, close))


# --- files -----------------------------------------------------------------------------------


def _list_file_names(folder: Path, ignored: str = "") -> set[str]:
    """Return the names of all files in a bundle's folder except the file ``ignored``, if any.

    Raises:
        BundleRefused: the folder contains an entry that a bundle may not have.
    """
    problems: list[Reason] = []
    names: set[str] = set()
    for path in list_folder(folder):
        if path.name == ignored:
            continue
        mode = path.lstat().st_mode
        names.add(path.name)
        file = shorten(path.name)
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
    raise_if_any(folder, problems)
    return names


def hash_file(path: Path) -> FileRecord:
    """Read and hash a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(sha256=sha256, bytes=file.tell())


def _find_differences(
    folder: Path, names: set[str], records: Mapping[str, FileRecord]
) -> Iterator[Reason]:
    """Yield the differences between a folder and its manifest; reads and hashes every file."""
    for name in sorted(records.keys() - names):
        yield Reason("file_missing", file=shorten(name))
    for name in sorted(names - records.keys()):
        yield Reason("file_unlisted", file=shorten(name), manifest=MANIFEST)
    for name in sorted(names & records.keys()):
        size = (folder / name).stat().st_size
        if size != (expected := records[name]).bytes:
            yield Reason("file_size_differs", file=shorten(name), got=size, expected=expected.bytes)
        elif (actual_hash := hash_file(folder / name).sha256) != expected.sha256:
            yield Reason(
                "file_hash_differs", file=shorten(name), got=actual_hash, expected=expected.sha256
            )


def _find_draft_path_problem(folder: Path, entry: str, text: str) -> Reason | None:
    """Return why the path ``text`` of a draft's field ``entry`` cannot be used; None if it can."""
    path, entry, shown = folder / text, truncate_sentence(entry), shorten(text)
    try:
        exists = path.exists()
    except OSError as fault:
        return Reason(
            "draft_path_unreadable", entry=entry, path=shown, problem=escape_message(fault)
        )
    if not exists:
        folder_name = truncate_sentence(str(folder))
        return Reason("draft_path_missing", entry=entry, path=shown, folder=folder_name)
    if folder.resolve().is_relative_to(path.resolve()):
        return Reason("draft_path_holds_draft", entry=entry, path=shown)
    if not Path(text).is_absolute() and not path.resolve().is_relative_to(folder.resolve()):
        return Reason("draft_path_outside", entry=entry, path=shown)
    return None


def _migrate_and_parse(
    kind: type[AnyModel], document: Mapping[str, Any], path: Path, *, stored: bool = False
) -> AnyModel:
    """Migrate and validate a ``model.json`` of any known schema version.

    Errors name locations in ``document``, not in the migrated document. ``stored``, as in
    ``parse``, is whether recpress wrote the document.
    """
    locations = VERSION_1_LOCATIONS if document["schema_version"] == 1 else {}
    return parse(kind, migrate(document), path, stored=stored, source_locations=locations)


def _remove_seal(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "seal"}


def _seal_line(body: bytes) -> bytes:
    """Return the last field and closing bracket of a ``model.json`` that begins with ``body``."""
    return f'  "seal": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
