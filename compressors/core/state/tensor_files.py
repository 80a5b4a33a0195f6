"""Write the files of a module's tensors: small ones together, each large one in a separate file.

A large tensor that a step leaves unchanged is not written again: the folder of the result gets a
hard link to the source's file. Read this file if a step writes more bytes than it changes.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressors.core.modules.formats import TensorSpec
from compressors.core.state.safetensors_rows import StoredRows
from compressors.core.state.safetensors_stream import DTYPES, write

log = logging.getLogger(__name__)

LARGE_BYTES = 10**6
"""Smallest size of a tensor with a separate file.

A step that changes a smaller tensor writes all smaller tensors again.
"""
SHARD_BYTES = 2**30  # limits the memory of programs that read whole files
INDEX = "model.safetensors.index.json"
"""Name of the file that maps each tensor to its file; written if there are several files."""
SINGLE = "model.safetensors"
"""Name of the file of the small tensors, or of all tensors if one file is enough."""


class TensorFile(NamedTuple):
    """A file that contains only one tensor, and the identity of the tensor loaded from it.

    Attributes:
        path: path of the file.
        address: address of the tensor's memory.
        version: torch's counter of writes to the tensor, when it was loaded.
        shape: shape of the tensor.
        dtype: dtype of the tensor.
    """

    path: Path
    address: int
    version: int
    shape: torch.Size
    dtype: torch.dtype

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the loaded one and has not been written to since."""
        return (
            tensor.data_ptr() == self.address
            and tensor._version == self.version
            and tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and tensor.is_contiguous()
        )

    def start(self) -> int:
        """Return the offset of the tensor's first byte in the file."""
        with self.path.open("rb") as opened:  # 8 bytes with the header's length, then the header
            return 8 + int.from_bytes(opened.read(8), "little")

    @contextmanager
    def rows(self) -> Iterator[StoredRows]:
        """Open the file to read rows of the tensor without mapping them."""
        with self.path.open("rb", buffering=0) as opened:
            spec = TensorSpec(tuple(self.shape), self.dtype)
            yield StoredRows(self.path, opened.fileno(), self.path.name, self.start(), spec)


def find_file(tensor: Tensor, files: Mapping[str, TensorFile]) -> TensorFile | None:
    """Return the file that holds a tensor, or None."""
    return next((file for file in files.values() if file.holds(tensor)), None)


def tensor_files(module: nn.Module, folder: Path) -> dict[str, TensorFile]:
    """Return the file of each tensor that has a separate file, by the tensor's name.

    Args:
        module: a module that ``load`` returned; its tensors must not have been written to.
        folder: the folder from which the module was loaded.
    """
    state = module.state_dict(keep_vars=True)
    files: dict[str, TensorFile] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1 or names[0] not in state:
                continue
            dtype = DTYPES.get(file.get_slice(names[0]).get_dtype())
        tensor = state[names[0]]
        if tensor.dtype == dtype:  # otherwise loading converted it
            files[names[0]] = TensorFile(
                path, tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype
            )
    return files


def file_name(tensor: str) -> str:
    """Return the file name for a large tensor: a readable form of its name, and a hash."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", tensor)[:100].lstrip(".")
    return f"{readable}-{hashlib.sha256(tensor.encode()).hexdigest()[:8]}.safetensors"


def write_tensors(
    tensors: Mapping[str, Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    *,
    large_bytes: int = LARGE_BYTES,
    unchanged: Mapping[str, Path] = MappingProxyType({}),
) -> tuple[Path, ...]:
    """Write tensors as one safetensors file, or as several with an index.

    Args:
        tensors: the tensors by name.
        folder: the folder; created if it does not exist.
        shard_bytes: largest size of a file of small tensors.
        large_bytes: smallest size of a tensor with a separate file.
        unchanged: existing files that contain exactly one of the tensors each, by the tensor's
            name; they are linked.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _group_tensors_by_file(tensors, shard_bytes, large_bytes)
    for file, tensors_of_file in files.items():
        path = folder / file
        path.unlink(missing_ok=True)  # it may be a link to a stored file
        source = unchanged.get(next(iter(tensors_of_file), ""))  # "": a file without tensors
        if source is None or len(tensors_of_file) > 1 or not _link(source, path):
            write(path, tensors_of_file)
    if len(files) > 1:
        file_of_tensor = {
            name: file for file, tensors_of_file in files.items() for name in tensors_of_file
        }
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": file_of_tensor}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
    return tuple(folder / file for file in files)


def _group_tensors_by_file(
    tensors: Mapping[str, Tensor], shard_bytes: int, large_bytes: int
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file, by the file's name.

    Each tensor of at least ``large_bytes`` has a separate file. The others fill one file after the
    other, called shards, of up to ``shard_bytes``; a single shard is named ``SINGLE``. If there is
    only one file, it is named ``SINGLE``, too.
    """
    shards: list[dict[str, Tensor]] = []
    large: dict[str, dict[str, Tensor]] = {}
    shard_size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes >= large_bytes:
            large[file_name(name)] = {name: tensor}
            continue
        if not shards or (shards[-1] and shard_size + tensor.nbytes > shard_bytes):
            shards.append({})
            shard_size = 0
        shards[-1][name] = tensor
        shard_size += tensor.nbytes
    if len(shards) + len(large) <= 1:
        return {SINGLE: dict(tensors)}
    if len(shards) == 1:
        return {SINGLE: shards[0], **large}
    count = len(shards)
    numbered = {
        f"model-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }
    return {**numbered, **large}


def _link(source: Path, target: Path) -> bool:
    """Create a hard link; return False if that is impossible, such as across disks."""
    try:
        target.hardlink_to(source)
    except OSError as fault:
        log.info("%s is copied because it cannot be linked: %s", target.name, fault)
        return False
    return True
