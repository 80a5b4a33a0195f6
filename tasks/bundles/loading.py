"""Load a stored bundle as a module, and describe its prepared splits for reading.

A split is stored as parquet in the bundle. A prepared split contains its columns as tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compressors.contracts import Architecture, Artifact, Bench, Part, Split
from compressors.core.model import Model
from compressors.core.state.argument_values import register_argument_classes
from compressors.core.state.module_state import largest_replaced, load
from compressors.core.state.tensor_files import tensor_files
from infra.bundle.architecture import argument_classes, network_class
from infra.bundle.bundle_folder import Manifest, SplitName, read
from infra.data.tokenization import tokens_inputs
from infra.errors import BundleRefused
from infra.memory import require_memory
from infra.settings import load_settings
from tasks.orchestration.workspace import local

MAX_LAYER_BYTES = 2**46
"""64 TiB of float32: more than any layer of a served model."""
SCORING_ROWS = 1024
"""Rows per batch when a split is scored.

With batches of 4,096 rows, the activations of a layer with 4,096 outputs were the peak of an
order's memory. ``tasks/orchestration/memory_estimate.py`` does not count activations.
"""


@dataclass(frozen=True)
class LoadedBundle:
    """A bundle that was loaded on this machine.

    Attributes:
        artifact: the bundle's artifact.
        manifest: its ``model.json``.
        folder: local folder with its files.
        model: the module with its weights, and its plan if it is compressed.
    """

    artifact: Artifact
    manifest: Manifest
    folder: Path
    model: Model


def load_bundle(artifact: Artifact) -> LoadedBundle:
    """Verify a stored bundle and load its module with memory-mapped tensors.

    Raises:
        BundleRefused: the bundle is unsafe or its architecture is not allowed.
        ModelRefused: its tensors do not match its architecture.
    """
    folder = local(artifact)
    manifest = read(folder)
    return LoadedBundle(artifact, manifest, folder, model_of(folder, manifest))


def model_of(folder: Path, manifest: Manifest) -> Model:
    """Load the module of a verified bundle folder.

    Raises:
        BundleRefused: a layer that a compressed module replaces was larger than any real layer.
        OutOfMemory: such a layer, which the model's class first builds at its original size, does
            not fit in memory.
    """
    network, name = manifest.network, f"{manifest.name}@{manifest.version}"
    largest = largest_replaced(network)
    if largest > MAX_LAYER_BYTES:
        raise BundleRefused("layer_too_large", name=name, most_bytes=MAX_LAYER_BYTES, got=largest)
    require_memory(largest, f"Building {name}")
    architecture = import_architecture(network.architecture)
    module = load(architecture, network, folder)
    files = tensor_files(module, folder)
    return Model(module, architecture, network, manifest.plan, files=files)


def import_architecture(architecture: Architecture) -> type[nn.Module]:
    """Import the class of a network and the classes that its arguments name.

    Raises:
        BundleRefused: a class is not in an allowed module, or cannot be imported.
    """
    allowed = load_settings().allowed_modules
    register_argument_classes(argument_classes(architecture.argument_classes, allowed))
    return network_class(architecture.path, allowed)


def data_path(manifest: Manifest, split: SplitName) -> Path:
    """Return the local parquet file or folder of one split, verified by its hash.

    Raises:
        BundleRefused: the bundle has no such split.
    """
    reference = manifest.data.get(split)
    if reference is None:
        raise BundleRefused(
            "split_missing",
            name=manifest.name,
            version=manifest.version,
            split=split,
            splits=tuple(manifest.data) or ("none",),
        )
    return local(reference.artifact) / reference.file


def tokenizer_files(manifest: Manifest) -> dict[str, Path]:
    """Return the local file of each tokenizer that an input names, by its name in ``transforms``.

    A transform is an artifact of one file or folder. A missing name is left out: it is reported
    when the tokenizer is loaded (``infra/data/tokenization.py``).
    """
    names = {item.tokenizer for item in tokens_inputs(manifest.signature)}
    return {
        name: next(local(artifact).iterdir())
        for name, artifact in manifest.transforms.items()
        if name in names
    }


def fetch_split(prepared: Artifact, rows: int) -> Split:
    """Copy a prepared split to this machine, if it is not here yet, and describe it for reading."""
    return Split(path=str(local(prepared)), sha256=prepared.sha256, rows=rows)


def build_bench(
    manifest: Manifest,
    splits: Mapping[Part, Split],
    teacher: Artifact,
    seed: int,
    checkpoints: Path | None = None,
    teachers: tuple[Artifact, ...] = (),
    device: str = "cpu",
) -> Bench:
    """Build the bench of a step: the data it may learn from, without test data.

    Args:
        manifest: the manifest of the bundle to compress.
        splits: the prepared splits and soft labels that the step needs; ``traffic`` has logged
            requests, which have no labels.
        teacher: the bundle of the untouched model.
        seed: seed of all random numbers of the step.
        checkpoints: folder for the checkpoints of a training step; None for no checkpoints.
        teachers: bundles of the additional teachers.
        device: the device of a training step.
    """
    return Bench(
        signature=manifest.signature,
        train=splits.get("train"),
        calibration=splits.get("calibration"),
        validation=splits.get("validation"),
        soft_labels=splits.get("soft_labels"),
        traffic=splits.get("traffic"),
        traffic_soft_labels=splits.get("traffic_soft_labels"),
        items=splits.get("items"),
        teacher=teacher,
        teachers=teachers,
        seed=seed,
        device=device,
        checkpoints=None if checkpoints is None else str(checkpoints),
    )
