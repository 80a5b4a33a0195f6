"""Pack, check and show bundles. No Prefect: the command line and flows call these functions.

A draft is a folder with a model and its data as the user wrote it. Packing checks a draft and
stores it as a bundle. Sealing, a part of packing, writes the manifest ``model.json`` with the hash
of every file. ``vocabularies`` and ``transforms`` of a draft name files or folders that are stored
unchanged with the model.
"""

import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import field_serializer
from torch import nn

from compressors.contracts import Artifact, Frozen, artifact_name, metric_problem
from compressors.contracts.reasons import Reason
from compressors.core.smoke_test import smoke_test
from compressors.core.state.module_state import construction_notes, map_tensors
from compressors.core.state.tensor_files import write_tensors
from infra.bundle.bundle_folder import (
    MANIFEST,
    DataReference,
    Draft,
    Manifest,
    SplitName,
    TensorFact,
    check_weights,
    parse_manifest,
    read,
    read_draft,
    seal,
    seal_again,
    table_rows,
)
from infra.bundle.shards import stored_tensors
from infra.data.catalogue import require_items
from infra.data.split_statistics import SplitStatistics, check_ids, check_shapes, split_statistics
from infra.data.tokenization import check_tokenizers
from infra.errors import AlreadyThere, ArtifactMissing, BundleRefused, RecordRefused, Refused
from infra.settings import load_settings
from infra.store.chunks import list_regular_files
from infra.store.disk import translate_input_errors
from infra.store.object_store import Store
from infra.store.temporary import scratch_folder
from tasks.bundles.baseline import check_baseline, check_labels, check_scores, require_sound
from tasks.bundles.bundle_ref import (
    BundleRecord,
    bundle_key,
    bundle_manifest,
    bundle_record,
    resolve,
    write_bundle_record,
)
from tasks.bundles.loading import data_path, import_architecture, model_of, tokenizer_files
from tasks.orchestration.workspace import local, store

log = logging.getLogger(__name__)

LARGE_BYTES = 16 * 10**6
"""Tensors of at least this size get separate files in a packed bundle."""


class Packed(Frozen):
    """The result of ``pack``.

    Attributes:
        name: name of the bundle.
        version: version of the bundle.
        artifact: the stored bundle.
        rows: number of rows of each split.
        tables: number of rows of each embedding table.
        notes: remarks on how the model's class was constructed.
        warnings: problems of labels and scores that do not prevent packing.
    """

    name: str
    version: str
    artifact: Artifact
    rows: dict[str, int]
    tables: dict[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[Reason, ...] = ()

    @field_serializer("warnings")
    def _sentences(self, warnings: tuple[Reason, ...]) -> tuple[str, ...]:
        """Serialize warnings as sentences."""
        return tuple(map(str, warnings))


@dataclass(frozen=True)
class CheckedBundle:
    """The result of ``examine``.

    Attributes:
        manifest: the bundle's manifest.
        facts: dtype, shape and bytes of each tensor.
        warnings: problems of labels and scores that do not prevent measurement.
    """

    manifest: Manifest
    facts: dict[str, TensorFact]
    warnings: tuple[Reason, ...]


def pack(folder: Path) -> Packed:
    """Check a draft folder completely and store it as a bundle.

    The weights, each split and each vocabulary are stored as separate artifacts, to which the
    bundle refers by hash. Packing the same draft again changes nothing.

    Raises:
        BundleRefused: the draft is unsafe or inconsistent.
        DataRefused: the data does not match the signature or the tables, or labels or scores make
            every measurement meaningless.
        FileRefused: a file cannot be read, or has the wrong kind.
        AlreadyThere: another bundle was packed with this name and version.
        StoreUnavailable: the machine lacks space or another resource.
    """
    with translate_input_errors(folder):
        return _pack(folder)


def _pack(folder: Path) -> Packed:
    draft = read_draft(folder)
    _require_inside_draft(folder, draft)
    network = import_architecture(draft.network.architecture)
    if "test" not in draft.data:
        raise BundleRefused("test_data_missing", folder=str(folder))
    require_items(draft.data, draft.signature, folder)
    statistics = {
        split: split_statistics(folder / path, draft.signature.of_split(split))
        for split, path in draft.data.items()
    }
    check_shapes(_by_split_name(statistics), draft.signature)
    if "train" not in draft.data and "calibration" not in draft.data:
        raise BundleRefused("training_data_missing", folder=str(folder))
    paths = {str(split): folder / path for split, path in draft.data.items()}
    notes = construction_notes(network, draft.network, folder)
    with scratch_folder("pack") as scratch:
        # This also checks nulls, NaN, types, lengths and labels, before anything is stored.
        tokenizers = {key: folder / path for key, path in draft.transforms.items()}
        labelled = check_labels(draft.signature, paths, paths, scratch / "test", tokenizers)
        require_sound(labelled.problems, is_packed=False)
        bundle_store = store()
        staged = scratch / "bundle"
        staged.mkdir()
        for shard in sorted(folder.glob("*.safetensors*")):  # files of the weights, and their index
            _link_or_copy(shard, staged / shard.name)
        manifest = _seal_bundle(staged, draft, folder, statistics, notes, bundle_store)
        facts, module = _check_model(staged, manifest)
        rows_of_table = table_rows(facts, manifest)
        check_ids(_by_split_name(statistics), draft.signature, rows_of_table)
        check_tokenizers(draft.signature, tokenizers, rows_of_table)
        problems = check_scores(module, draft.signature, labelled)
        warnings = require_sound(problems, is_packed=False)
        artifact = _store_bundle(bundle_store, manifest, staged)
    return Packed(
        name=manifest.name,
        version=manifest.version,
        artifact=artifact,
        rows={split: statistic.rows for split, statistic in statistics.items()},
        tables=rows_of_table,
        notes=notes,
        warnings=warnings,
    )


def check(reference: str) -> tuple[Manifest, dict[str, TensorFact]]:
    """Call ``examine``, and return only the manifest and the tensors' dtypes, shapes and bytes.

    Args:
        reference: as in ``examine``.

    Raises:
        BundleRefused, DataRefused, ModelRefused, ArtifactMissing, ArtifactDamaged: the first
            problem.
    """
    checked = examine(reference)
    return checked.manifest, checked.facts


def examine(reference: str) -> CheckedBundle:
    """Verify a bundle: file hashes, weights, a test run of the model, ids, labels and scores.

    Args:
        reference: an artifact URI, ``name@version``, ``name``, or the folder of a sealed bundle.

    Raises:
        BundleRefused, DataRefused, ModelRefused, ArtifactMissing, ArtifactDamaged: the first
            problem.
    """
    with translate_input_errors(Path(reference)):
        return _examine(reference)


def _examine(reference: str) -> CheckedBundle:
    folder = _find_bundle_folder(reference)
    manifest = read(folder)
    signature = manifest.signature
    grouped = signature.group is not None
    for output in signature.outputs:
        if problem := metric_problem(output.kind, output.metric, grouped=grouped):
            raise BundleRefused(
                "metric_unfit", name=manifest.name, version=manifest.version, problem=problem
            )
    require_items(manifest.data, signature, folder)
    paths = {split: data_path(manifest, split) for split in manifest.data}
    statistics = {
        split: split_statistics(path, signature.of_split(split)) for split, path in paths.items()
    }
    check_shapes(_by_split_name(statistics), signature)
    facts, module = _check_model(folder, manifest)
    rows_of_table, tokenizers = table_rows(facts, manifest), tokenizer_files(manifest)
    check_ids(_by_split_name(statistics), signature, rows_of_table)
    check_tokenizers(signature, tokenizers, rows_of_table)
    by_name = {str(split): path for split, path in paths.items()}
    problems = check_baseline(module, signature, by_name, tokenizers)
    return CheckedBundle(manifest, facts, require_sound(problems, is_packed=True))


def show(reference: str) -> Manifest:
    """Verify the hashes of a bundle's files and return its manifest.

    Args:
        reference: as in ``examine``.
    """
    with translate_input_errors(Path(reference)):
        return read(_find_bundle_folder(reference))


def _find_bundle_folder(reference: str) -> Path:
    """Return the local folder of a bundle; ``reference`` is a folder or a stored bundle."""
    if artifact_name(reference) is None and Path(reference).is_dir():
        return Path(reference)
    return local(resolve(reference))


def _seal_bundle(
    staged: Path,
    draft: Draft,
    folder: Path,
    statistics: Mapping[SplitName, SplitStatistics],
    notes: tuple[str, ...],
    bundle_store: Store,
) -> Manifest:
    """Store the data of a draft, and write the manifest next to its staged weights."""
    data: dict[SplitName, DataReference] = {
        split: _store_data(bundle_store, folder / path, statistics[split].rows)
        for split, path in draft.data.items()
    }
    vocabularies = {
        key: _store_separately(bundle_store, folder / path)
        for key, path in draft.vocabularies.items()
    }
    transforms = {
        key: _store_separately(bundle_store, folder / path)
        for key, path in draft.transforms.items()
    }
    return seal(
        staged,
        name=draft.name,
        version=draft.version,
        signature=draft.signature,
        network=draft.network,
        data=data,
        vocabularies=vocabularies,
        transforms=transforms,
        notes=notes,
    )


def _by_split_name(statistics: Mapping[SplitName, SplitStatistics]) -> dict[str, SplitStatistics]:
    # mypy does not accept a mapping with keys of the type ``SplitName``, a subtype of ``str``.
    return {str(split): statistic for split, statistic in statistics.items()}


def _check_model(folder: Path, manifest: Manifest) -> tuple[dict[str, TensorFact], nn.Module]:
    """Check that the weights are finite, and that the model loads and runs on valid inputs."""
    facts = check_weights(folder, manifest)
    # The smoke test compares two loads, since a constructor may create random attributes.
    module, second_load = (model_of(folder, manifest).module for _ in range(2))
    smoke_test(module, manifest.signature, manifest.network.architecture.path, second_load)
    return facts, module


def _require_inside_draft(folder: Path, draft: Draft) -> None:
    """Raise if vocabularies or transforms are outside the draft's folder; only data may be.

    Raises:
        BundleRefused: contains the entry of the draft.
    """
    for section, entries in (
        ("vocabularies", draft.vocabularies),
        ("transforms", draft.transforms),
    ):
        for key, path in entries.items():
            if not (folder / path).resolve().is_relative_to(folder.resolve()):
                raise BundleRefused(
                    "file_outside_draft", entry=f"{section}.{key}", path=path, folder=str(folder)
                )


def _store_data(bundle_store: Store, path: Path, rows: int) -> DataReference:
    artifact = _store_separately(bundle_store, path)
    return DataReference(artifact=artifact, file=path.name, rows=rows)


def _store_separately(bundle_store: Store, path: Path) -> Artifact:
    """Store one file, or one folder of part files, as a separate artifact."""
    with scratch_folder("pack") as scratch:
        if path.is_dir():
            # list_regular_files raises for symbolic links, which may point outside the folder.
            for name, _ in list_regular_files(path):
                destination = scratch / path.name / name
                destination.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(path / name, destination)
        else:
            _link_or_copy(path, scratch / path.name)
        return bundle_store.put(scratch)


def _link_or_copy(source: Path, destination: Path) -> None:
    """Create a hard link if the file system can, so that packing needs no second copy on disk."""
    try:
        destination.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, destination)


def _store_bundle(bundle_store: Store, manifest: Manifest, staged: Path) -> Artifact:
    """Store a sealed bundle with every large tensor in a separate file.

    The result of a step can then share the files of the large tensors that it does not change.
    If an earlier recpress packed this version with the files of the draft, that bundle is returned.

    Raises:
        AlreadyThere: another bundle has this name and version.
    """
    tensors = stored_tensors(staged).values()
    tensors_in_shard = Counter(tensor.shard for tensor in tensors)
    if not any(
        tensor.fact.bytes >= LARGE_BYTES and tensors_in_shard[tensor.shard] > 1
        for tensor in tensors
    ):
        return _store_once(bundle_store, manifest, staged)
    with scratch_folder("pack", bundle_store.scratch(load_settings().cache)) as separate:
        write_tensors(map_tensors(staged), separate, large_bytes=LARGE_BYTES)
        try:
            return _store_once(bundle_store, seal_again(separate, manifest), separate, move=True)
        except AlreadyThere:
            return _store_once(bundle_store, manifest, staged)


def _store_once(
    bundle_store: Store, manifest: Manifest, staged: Path, *, move: bool = False
) -> Artifact:
    """Store a sealed bundle under its name and version, unless it is already stored.

    A damaged record of this name and version is replaced, unless it contains the hash of another
    bundle with this name and version.

    Args:
        bundle_store: the store.
        manifest: the bundle's manifest.
        staged: the bundle's folder.
        move: whether the files may be moved into the store.

    Raises:
        AlreadyThere: another bundle has this name and version.
    """
    name, version = manifest.name, manifest.version
    is_damaged = False
    try:
        record = bundle_record(name, version)
        if record is not None and (stored := _get_recorded_artifact(record, manifest)) is not None:
            return stored
    except RecordRefused as fault:
        is_damaged = True
        if (other := _find_other_bundle(bundle_store, manifest)) is not None:
            raise _build_packed_error(manifest, other) from fault
        log.warning("%s Replacing the record.", fault)
    artifact = bundle_store.take(staged) if move else bundle_store.put(staged)
    record = BundleRecord(name=name, version=version, artifact=artifact, packed_at=time.time())
    try:
        write_bundle_record(record, replace=is_damaged)
    except AlreadyThere:  # another process has packed this version
        other_record = bundle_record(name, version)
        if other_record is None:  # and its record was deleted since
            raise
        stored = _get_recorded_artifact(other_record, manifest)
        if stored is None:
            raise AlreadyThere(
                "version_files_missing",
                name=name,
                version=version,
                sha256=other_record.artifact.sha256,
            ) from None
        return stored
    return artifact


def _get_recorded_artifact(record: BundleRecord, manifest: Manifest) -> Artifact | None:
    """Return the artifact of a record if it is the bundle of ``manifest``; None if it is missing.

    Manifests are compared by value, not by bytes: earlier versions also wrote the store's root.

    Raises:
        AlreadyThere: the record is of another bundle.
        RecordRefused: the recorded artifact is not a bundle of this name and version.
    """
    try:
        recorded_manifest = bundle_manifest(record)
    except ArtifactMissing:
        return None
    if recorded_manifest != manifest:
        raise _build_packed_error(manifest, record.artifact.sha256)
    return record.artifact


def _find_other_bundle(bundle_store: Store, manifest: Manifest) -> str | None:
    """Search a damaged record for the hash of another bundle of this name and version."""
    try:
        body = bundle_store.read(bundle_key(manifest.name, manifest.version))
    except Refused:
        return None
    hashes: list[bytes] = re.findall(rb"[0-9a-f]{64}", body)
    for sha256 in {text.decode() for text in hashes}:
        try:
            artifact = bundle_store.find(sha256)
            if artifact is None:
                continue
            path = Path(bundle_store.uri_of(artifact))
            other = parse_manifest(bundle_store.file(artifact, MANIFEST), path)
        except Refused:
            continue
        if (other.name, other.version) == (manifest.name, manifest.version) and other != manifest:
            return sha256
    return None


def _build_packed_error(manifest: Manifest, sha256: str) -> AlreadyThere:
    return AlreadyThere(
        "version_packed", name=manifest.name, version=manifest.version, sha256=sha256
    )
