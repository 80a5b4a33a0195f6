"""What a long step writes down to go on after a crash: tensors, and a few facts about them.

A folder holds one progress: ``progress.json``, which names the safetensors file it belongs to.
The file is written first and the name last, each by a rename, so a crash at any moment leaves
the earlier progress or the new one.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Tensors by name, and plain facts; not-a-number among them is allowed."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def write_progress(folder: str, progress: Progress) -> None:
    """Replace what the folder holds."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    name = f"epoch-{len(progress.facts['epochs']):05d}.safetensors"
    part = place / f"{name}.part"
    save_file({key: tensor.contiguous() for key, tensor in progress.tensors.items()}, part)
    os.replace(part, place / name)  # noqa: PTH105
    part = place / f"{NAME}.part"
    part.write_text(json.dumps({"tensors": name, **progress.facts}))
    os.replace(part, place / NAME)  # noqa: PTH105
    for old in place.glob("*.safetensors"):
        if old.name != name:
            old.unlink()


def read_progress(folder: str, held: Mapping[str, Tensor]) -> Progress | None:
    """The progress a folder holds, or None where it is empty or of another network.

    Args:
        folder: where it may lie.
        held: the tensors of the network as they are now; names and shapes must be the same.
    """
    place = Path(folder)
    if not (place / NAME).is_file():
        return None
    facts = json.loads((place / NAME).read_text())
    tensors = load_file(place / facts.pop("tensors"))
    now = {key.removeprefix("now/"): v for key, v in tensors.items() if key.startswith("now/")}
    if {name: tensor.shape for name, tensor in now.items()} != {
        name: tensor.shape for name, tensor in held.items()
    }:
        return None
    return Progress(tensors, facts)
