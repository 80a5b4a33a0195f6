"""Pack, check and show bundles. No Prefect: the command line and flows call these."""

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
from compressors.core.state.module_state import construction_notes, mapped
from compressors.core.state.tensor_files import write_tensors
from infra.bundle.architecture import network_class
from infra.bundle.bundle_folder import (
    MANIFEST,
    DataReference,
    Draft,
    Manifest,
    SplitName,
    TensorFact,
    check_weights,
    manifest_of,
    read,
    read_draft,
    seal,
    seal_again,
    table_rows,
)
from infra.bundle.shards import stored_tensors
from infra.data.catalogue import require_items
from infra.data.splits import SplitStatistics, check_ids, check_shapes, split_statistics
from infra.errors import AlreadyThere, ArtifactMissing, BundleRefused, RecordRefused, Refused
from infra.settings import load_settings
from infra.store.chunks import regular_files
from infra.store.disk import input_files
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
from tasks.bundles.loading import data_path, model_of
from tasks.orchestration.workspace import local, store

log = logging.getLogger(__name__)

LARGE_BYTES = 16 * 10**6
"""Size from which a packed bundle has a file for one tensor; smaller ones stay in their files."""


class Packed(Frozen):
    """A stored bundle."""

    name: str
    version: str
    artifact: Artifact
    rows: dict[str, int]
    tables: dict[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[Reason, ...] = ()

    @field_serializer("warnings")
    def _sentences(self, warnings: tuple[Reason, ...]) -> tuple[str, ...]:
        return tuple(map(str, warnings))


@dataclass(frozen=True)
class Checked:
    """A verified bundle: its manifest, its tensors, and warnings about its model or labels."""

    manifest: Manifest
    facts: dict[str, TensorFact]
    warnings: tuple[Reason, ...]


def pack(folder: Path) -> Packed:
    """Check a draft folder completely and store it as a bundle.

    The weights, the data and the vocabularies go into the object store as artifacts; the bundle
    refers to them by hash. Packing the same draft again changes nothing.

    Raises:
        BundleRefused: the draft is unsafe or inconsistent.
        DataRefused: the data does not match the signature or the tables, or labels and scores make
            every measurement meaningless.
        FileRefused: a file cannot be read, or has the wrong kind.
        AlreadyThere: another bundle was packed under this name and version.
        StoreUnavailable: the machine lacks space or another resource.
    """
    with input_files(folder):
        return _pack(folder)


def _pack(folder: Path) -> Packed:
    draft = read_draft(folder)
    _inside(folder, draft)
    architecture = draft.network.architecture
    network = network_class(architecture.path, load_settings().allowed_modules)
    if "test" not in draft.data:
        raise BundleRefused("test_data_missing", folder=str(folder))
    require_items(draft.data, draft.signature, folder)
    statistics = {
        split: split_statistics(folder / path, draft.signature.of_split(split))
        for split, path in draft.data.items()
    }
    check_shapes(_by_name(statistics), draft.signature)
    if "train" not in draft.data and "calibration" not in draft.data:
        raise BundleRefused("training_data_missing", folder=str(folder))
    paths = {str(split): folder / path for split, path in draft.data.items()}
    notes = construction_notes(network, draft.network, folder)
    with scratch_folder("pack") as scratch:
        # The strictest reader: it checks nulls, NaN, types, lengths, labels. It runs before
        # anything is stored; a run prepares the splits again.
        labelled = check_labels(draft.signature, paths, paths, scratch / "test")
        require_sound(labelled.problems, packed=False)
        to = store()
        staged = scratch / "bundle"
        staged.mkdir()
        for shard in sorted(folder.glob("*.safetensors*")):
            _place(shard, staged / shard.name)
        manifest = _seal(staged, draft, folder, statistics, notes, to)
        facts, module = _check_model(staged, manifest)
        rows_of_table = table_rows(facts, manifest)
        check_ids(_by_name(statistics), draft.signature, rows_of_table)
        problems = check_scores(module, draft.signature, labelled)
        warnings = require_sound(problems, packed=False)
        artifact = _store(to, manifest, staged)
    return Packed(
        name=manifest.name,
        version=manifest.version,
        artifact=artifact,
        rows={split: found.rows for split, found in statistics.items()},
        tables=rows_of_table,
        notes=notes,
        warnings=warnings,
    )


def check(reference: str) -> tuple[Manifest, dict[str, TensorFact]]:
    """Verify a bundle from its bytes to its loaded module, and its data's ids.

    Args:
        reference: as in ``examine``.

    Raises:
        BundleRefused, DataRefused, ModelRefused, ArtifactMissing, ArtifactDamaged: the first fault.
    """
    checked = examine(reference)
    return checked.manifest, checked.facts


def examine(reference: str) -> Checked:
    """Verify a bundle from its bytes to its loaded module, its data's ids, labels and scores.

    Args:
        reference: an artifact URI, ``name@version``, ``name``, or the folder of a sealed bundle.

    Raises:
        BundleRefused, DataRefused, ModelRefused, ArtifactMissing, ArtifactDamaged: the first fault.
    """
    with input_files(Path(reference)):
        return _examine(reference)


def _examine(reference: str) -> Checked:
    folder = _folder(reference)
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
    check_shapes(_by_name(statistics), signature)
    facts, module = _check_model(folder, manifest)
    check_ids(_by_name(statistics), signature, table_rows(facts, manifest))
    by_name = {str(split): path for split, path in paths.items()}
    problems = check_baseline(module, signature, by_name)
    return Checked(manifest, facts, require_sound(problems, packed=True))


def show(reference: str) -> Manifest:
    """Return a bundle's manifest, with its files verified."""
    with input_files(Path(reference)):
        return read(_folder(reference))


def _folder(reference: str) -> Path:
    """Return the local folder of a bundle: a given folder, or a stored one."""
    if artifact_name(reference) is None and Path(reference).is_dir():
        return Path(reference)
    return local(resolve(reference))


def _seal(
    staged: Path,
    draft: Draft,
    folder: Path,
    statistics: Mapping[SplitName, SplitStatistics],
    notes: tuple[str, ...],
    to: Store,
) -> Manifest:
    data: dict[SplitName, DataReference] = {
        split: _reference(to, folder / path, statistics[split].rows)
        for split, path in draft.data.items()
    }
    return seal(
        staged,
        name=draft.name,
        version=draft.version,
        signature=draft.signature,
        network=draft.network,
        data=data,
        vocabularies={key: _alone(to, folder / path) for key, path in draft.vocabularies.items()},
        transforms={key: _alone(to, folder / path) for key, path in draft.transforms.items()},
        notes=notes,
    )


def _by_name(statistics: Mapping[SplitName, SplitStatistics]) -> dict[str, SplitStatistics]:
    return {str(split): found for split, found in statistics.items()}


def _check_model(folder: Path, manifest: Manifest) -> tuple[dict[str, TensorFact], nn.Module]:
    """Check that weights are finite, the network loads, and it runs on all valid inputs."""
    facts = check_weights(folder, manifest)
    module, again = (model_of(folder, manifest).module for _ in range(2))
    smoke_test(module, manifest.signature, manifest.network.architecture.path, again)
    return facts, module


def _inside(folder: Path, draft: Draft) -> None:
    """Raise if vocabularies or transforms are outside the draft; only data may be elsewhere.

    Raises:
        BundleRefused: contains the entry.
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


def _reference(to: Store, path: Path, rows: int) -> DataReference:
    return DataReference(artifact=_alone(to, path), file=path.name, rows=rows)


def _alone(to: Store, path: Path) -> Artifact:
    """Store one file, or one folder of part files, as a separate artifact."""
    with scratch_folder("pack") as scratch:
        if path.is_dir():
            for name, _ in regular_files(path):  # it refuses links, which may point anywhere
                target = scratch / path.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _place(path / name, target)
        else:
            _place(path, scratch / path.name)
        return to.put(scratch)


def _place(source: Path, target: Path) -> None:
    _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> str:
    """Create a hard link if the file system can, so that packing needs no second copy on disk."""
    try:
        Path(target).hardlink_to(Path(source).resolve())
    except OSError:
        shutil.copyfile(source, target)
    return target


def _store(to: Store, manifest: Manifest, staged: Path) -> Artifact:
    """Store a sealed bundle, each large tensor in a file of its own.

    A step that does not change such a tensor then stores nothing for it. A version that was packed
    with the files of its draft, by an earlier version of recpress, keeps them.

    Raises:
        AlreadyThere: another bundle has this name and version.
    """
    tensors = stored_tensors(staged).values()
    in_shard = Counter(tensor.shard for tensor in tensors)
    if not any(one.fact.bytes >= LARGE_BYTES and in_shard[one.shard] > 1 for one in tensors):
        return _named(to, manifest, staged)
    with scratch_folder("pack", to.scratch(load_settings().cache)) as separate:
        write_tensors(mapped(staged), separate, large_bytes=LARGE_BYTES)
        try:
            return _named(to, seal_again(separate, manifest), separate, move=True)
        except AlreadyThere:
            return _named(to, manifest, staged)


def _named(to: Store, manifest: Manifest, staged: Path, *, move: bool = False) -> Artifact:
    """Store a sealed bundle under its name and version, unless it is already stored.

    A damaged record is written again, unless it still names another bundle of this version.

    Args:
        to: the store.
        manifest: the bundle's manifest.
        staged: its folder.
        move: whether its files may be moved into the store.

    Raises:
        AlreadyThere: another bundle has this name and version.
    """
    name, version = manifest.name, manifest.version
    is_damaged = False
    try:
        record = bundle_record(name, version)
        if record is not None and (same := _same(record, manifest)) is not None:
            return same
    except RecordRefused as fault:
        is_damaged = True
        if (other := _other_bundle(to, manifest)) is not None:
            raise _packed_before(manifest, other) from fault
        log.warning("%s It is restored.", fault)
    artifact = to.take(staged) if move else to.put(staged)
    record = BundleRecord(name=name, version=version, artifact=artifact, packed_at=time.time())
    try:
        write_bundle_record(record, replace=is_damaged)
    except AlreadyThere:  # another process has packed this version
        won = bundle_record(name, version)
        if won is None or (same := _same(won, manifest)) is None:
            raise _packed_before(manifest, "whose files are gone") from None
        return same
    return artifact


def _same(record: BundleRecord, manifest: Manifest) -> Artifact | None:
    """Return the recorded bundle if it is this one; None if its files are missing.

    Manifests are compared, not their bytes: earlier versions wrote the store's root into them.

    Raises:
        AlreadyThere: the record is of another bundle.
        RecordRefused: the record refers to something else.
    """
    try:
        held = bundle_manifest(record)
    except ArtifactMissing:
        return None
    if held != manifest:
        raise _packed_before(manifest, record.artifact.sha256)
    return record.artifact


def _other_bundle(to: Store, manifest: Manifest) -> str | None:
    """Return the hash in a damaged record, if it is another bundle of this name and version."""
    try:
        body = to.read(bundle_key(manifest.name, manifest.version))
    except Refused:
        return None
    names: list[bytes] = re.findall(rb"[0-9a-f]{64}", body)
    for sha256 in {name.decode() for name in names}:
        try:
            artifact = to.find(sha256)
            if artifact is None:
                continue
            held = manifest_of(to.file(artifact, MANIFEST), Path(to.uri_of(artifact)))
        except Refused:
            continue
        if (held.name, held.version) == (manifest.name, manifest.version) and held != manifest:
            return sha256
    return None


def _packed_before(manifest: Manifest, sha256: str) -> AlreadyThere:
    return AlreadyThere(
        "version_packed", name=manifest.name, version=manifest.version, sha256=sha256
    )
