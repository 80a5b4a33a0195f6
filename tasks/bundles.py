"""Pack, check and find bundles. No Prefect: the command line calls these, and flows do."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compressors.contracts import Artifact, Frozen, metric_problem
from compressors.state import construction_notes
from compressors.trial import try_out
from infra.architecture import network_class
from infra.bundle import (
    DataReference,
    Draft,
    Manifest,
    SplitName,
    TensorFact,
    check_weights,
    read,
    read_draft,
    seal,
    table_rows,
)
from infra.catalogue import need_items
from infra.data import SplitStatistics, check_ids, split_statistics
from infra.errors import AlreadyThere, BundleRefused
from infra.settings import load_settings
from infra.store import Store
from tasks.baseline import check_baseline, check_labels, check_scores, need_sound
from tasks.loading import data_path, model_of
from tasks.stored import local, store
from tasks.subject import bundle_key, resolve


class Packed(Frozen):
    """A bundle as it was stored."""

    name: str
    version: str
    artifact: Artifact
    rows: dict[str, int]
    tables: dict[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A verified bundle: its manifest, its tensors, and warnings about its model or labels."""

    manifest: Manifest
    facts: dict[str, TensorFact]
    warnings: tuple[str, ...]


def pack(folder: Path) -> Packed:
    """Check a draft folder completely and store it as a bundle.

    The weights, the data and the vocabularies go into the object store as artifacts; the bundle
    refers to them by hash. Packing the same draft again changes nothing.

    Raises:
        BundleRefused: the draft is unsafe or does not fit together.
        DataRefused: the data does not fit the schema or the tables, or labels and scores are
            such that nothing measured with them would mean anything.
        AlreadyThere: another bundle was packed under this name and version.
    """
    draft = read_draft(folder)
    _inside(folder, draft)
    architecture = draft.network.architecture
    network = network_class(architecture.path, load_settings().allowed_modules)
    if "test" not in draft.data:
        raise BundleRefused(
            f"{folder} refers to no test data; without it nothing can be gated. Add 'test' to "
            f"'data' in model.json."
        )
    need_items(draft.data, draft.signature, folder)
    statistics = {
        split: split_statistics(folder / path, draft.signature.of_split(split))
        for split, path in draft.data.items()
    }
    if "train" not in draft.data and "calibration" not in draft.data:
        raise BundleRefused(
            f"{folder} refers to neither train nor calibration data; a compressed model is "
            f"compared with the original on rows it may learn from. Add one of them."
        )
    paths = {str(split): folder / path for split, path in draft.data.items()}
    notes = construction_notes(network, draft.network)
    with tempfile.TemporaryDirectory(prefix="recpress-pack-") as scratch:
        # The strictest reading there is: nulls, NaN, types, lengths, labels. Before anything is
        # stored; a run prepares the splits again.
        labelled = check_labels(draft.signature, paths, paths, Path(scratch) / "test")
        need_sound(labelled.problems, packed=False)
        to = store()
        staged = Path(scratch) / "bundle"
        staged.mkdir()
        for shard in sorted(folder.glob("*.safetensors*")):
            _place(shard, staged / shard.name)
        manifest = _seal(staged, draft, folder, statistics, notes, to)
        facts, module = _check_model(staged, manifest)
        rows_of_table = table_rows(facts, manifest)
        check_ids(_by_name(statistics), draft.signature, rows_of_table)
        problems = check_scores(module, draft.signature, labelled)
        warnings = need_sound(problems, packed=False)
        artifact = to.put(staged)
    _name(to, manifest.name, manifest.version, artifact)
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
        reference: as for ``examine``.

    Raises:
        BundleRefused, DataRefused, ModelRefused, ArtifactMissing, ArtifactDamaged: what is wrong.
    """
    checked = examine(reference)
    return checked.manifest, checked.facts


def examine(reference: str) -> Checked:
    """Verify a bundle from its bytes to its loaded module, its data's ids, labels and scores.

    Args:
        reference: an artifact URI, ``name@version``, ``name``, or a folder holding a sealed
            bundle.

    Raises:
        BundleRefused, DataRefused, ModelRefused, ArtifactMissing, ArtifactDamaged: what is wrong.
    """
    folder = Path(reference)
    if not folder.is_dir():
        folder = local(resolve(reference))
    manifest = read(folder)
    signature = manifest.signature
    grouped = signature.group is not None
    if problem := metric_problem(signature.task, signature.metric, grouped=grouped):
        raise BundleRefused(
            f"{manifest.name}@{manifest.version}: {problem} in the draft's model.json, raise its "
            f"version and run 'recpress bundle pack' again."
        )
    need_items(manifest.data, signature, folder)
    facts, module = _check_model(folder, manifest)
    paths = {split: data_path(manifest, split) for split in manifest.data}
    statistics = {
        split: split_statistics(path, signature.of_split(split)) for split, path in paths.items()
    }
    check_ids(_by_name(statistics), signature, table_rows(facts, manifest))
    by_name = {str(split): path for split, path in paths.items()}
    problems = check_baseline(module, signature, by_name)
    return Checked(manifest, facts, need_sound(problems, packed=True))


def show(reference: str) -> Manifest:
    """A bundle's manifest, its files verified."""
    folder = Path(reference)
    return read(folder if folder.is_dir() else local(resolve(reference)))


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
    """Weights are finite, the network loads, and it runs on what its schema allows."""
    facts = check_weights(folder, manifest)
    module, again = (model_of(folder, manifest).module for _ in range(2))
    try_out(module, manifest.signature, manifest.network.architecture.path, again)
    return facts, module


def _inside(folder: Path, draft: Draft) -> None:
    """Refuse vocabularies and transforms from outside the draft; only data may lie elsewhere.

    Raises:
        BundleRefused: names the entry.
    """
    for section, entries in (
        ("vocabularies", draft.vocabularies),
        ("transforms", draft.transforms),
    ):
        for key, path in entries.items():
            if not (folder / path).resolve().is_relative_to(folder.resolve()):
                raise BundleRefused(
                    f"{section}.{key} names {path!r}, outside {folder}. Copy the file into the "
                    f"draft's folder; only data may lie elsewhere."
                )


def _reference(to: Store, path: Path, rows: int) -> DataReference:
    return DataReference(artifact=_alone(to, path), file=path.name, rows=rows)


def _alone(to: Store, path: Path) -> Artifact:
    """Store one file, or one folder of part files, as an artifact of its own."""
    with tempfile.TemporaryDirectory(prefix="recpress-pack-") as scratch:
        if path.is_dir():
            # Links inside are kept as links, which the store refuses: they may lead anywhere.
            shutil.copytree(
                path, Path(scratch) / path.name, symlinks=True, copy_function=_link_or_copy
            )
        else:
            _place(path, Path(scratch) / path.name)
        return to.put(Path(scratch))


def _place(source: Path, target: Path) -> None:
    _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> str:
    """A hard link where the file system allows, so that packing needs no second copy on disk."""
    try:
        Path(target).hardlink_to(Path(source).resolve())
    except OSError:
        shutil.copyfile(source, target)
    return target


def _name(to: Store, name: str, version: str, artifact: Artifact) -> None:
    record = {"artifact": artifact.model_dump(mode="json"), "packed_at": time.time()}
    try:
        to.create(bundle_key(name, version), json.dumps(record).encode())
    except AlreadyThere as fault:
        held = Artifact.model_validate(json.loads(to.read(bundle_key(name, version)))["artifact"])
        if held.sha256 != artifact.sha256:
            raise AlreadyThere(
                f"{name}@{version} was packed before with other contents ({held.sha256[:12]}, now "
                f"{artifact.sha256[:12]}). A version never changes: raise 'version' in model.json."
            ) from fault
