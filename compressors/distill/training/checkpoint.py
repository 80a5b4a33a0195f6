"""Checkpoints of a long training step, from which it resumes after a crash.

A folder contains one checkpoint: ``progress.json`` with values such as the losses of epochs, and
the safetensors file that it names. The safetensors file is written first and ``progress.json``
last, each under a temporary name and then renamed, so a crash at any moment leaves the previous
checkpoint or the new one. File names are unique, and each process removes only files that it wrote.
So if two processes run the same training at once, the checkpoint of one of them remains. An
unreadable checkpoint is ignored. A failed write is only logged, and training continues.
"""

import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class TrainingProgress:
    """The state of a training.

    Attributes:
        tensors: tensors by name, with a prefix: ``now/`` for the network's current tensors,
            ``best/`` for those after the best epoch, ``moments/`` for Adam's moments.
        json_values: all other state as values that JSON can store, including NaN: the ``epochs``
            (number, loss and validation metric of each), and the counters that ``trainer.py``
            restores.
    """

    tensors: dict[str, Tensor]
    json_values: dict[str, Any]


def store_progress(folder: str, progress: TrainingProgress) -> bool:
    """Replace the folder's checkpoint; log a warning and return False if that fails."""
    try:
        write_progress(folder, progress)
    except (OSError, SafetensorError) as fault:
        log.warning("progress could not be written to %s and is kept in memory: %s", folder, fault)
        return False
    return True


def write_progress(folder: str, progress: TrainingProgress) -> None:
    """Replace the folder's checkpoint.

    Raises:
        OSError, SafetensorError: the checkpoint cannot be written; the previous one remains.
    """
    directory = Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    suffix = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    name = f"epoch-{len(progress.json_values['epochs']):05d}-{suffix}.safetensors"
    temporary_path = directory / f"{name}.part"
    try:
        save_file(
            {key: tensor.contiguous() for key, tensor in progress.tensors.items()}, temporary_path
        )
        os.replace(temporary_path, directory / name)  # noqa: PTH105
        temporary_path = directory / f"{PROGRESS_FILE}-{suffix}.part"
        temporary_path.write_text(json.dumps({"tensors": name, **progress.json_values}))
        os.replace(temporary_path, directory / PROGRESS_FILE)  # noqa: PTH105
    except BaseException:
        temporary_path.unlink(missing_ok=True)
        raise
    for old in directory.glob(f"epoch-*-{os.getpid()}-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def read_progress(folder: str, expected: Mapping[str, Tensor]) -> TrainingProgress | None:
    """Read a folder's checkpoint; None if it is missing, damaged or of another network.

    Args:
        folder: where the checkpoint is stored.
        expected: the network's current tensors; the stored ones must have the same names and
            shapes.
    """
    directory = Path(folder)
    if not (directory / PROGRESS_FILE).is_file():
        return None
    try:
        json_values = json.loads((directory / PROGRESS_FILE).read_text())
        tensors = load_file(directory / json_values.pop("tensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as fault:
        log.warning(
            "the progress in %s cannot be read, so training starts from the beginning: %s",
            folder,
            fault,
        )
        return None
    for prefix in ("now/", "best/"):
        stored = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if {name: tensor.shape for name, tensor in stored.items()} != {
            name: tensor.shape for name, tensor in expected.items()
        }:
            return None
    return TrainingProgress(tensors, json_values)
