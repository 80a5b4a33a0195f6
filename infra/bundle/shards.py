"""Read the headers of a bundle's ``*.safetensors`` files, and check that weights are finite.

Each such file is a shard of the model. The safetensors library validates headers. Weights are read
block by block as plain bytes, so a check needs neither torch nor the memory of a whole table.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from compressors.contracts import Frozen
from compressors.contracts.reasons import Reason
from infra.bundle.json_limits import MAX_JSON_BYTES, check_limits
from infra.bundle.json_reader import decode, escape_message, raise_if_any, read_json, shorten
from infra.errors import BundleRefused

INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 16 << 20

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")

# First bytes of a pickle of protocol 2 to 5; of protocol 0, if the value is a dict, list, instance
# or global; and of a zip file, which torch.save writes.
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\((?:d|l|i)|c[A-Za-z_][\w.]*\n[\w.]+\n|PK[\x03\x05]")

# For each dtype of safetensors: an integer type of numpy, a mask and a value. A weight, read as
# this integer type, is NaN or infinite if ``weight & mask == value``. In IEEE-like formats these
# weights have all bits of the exponent set; other formats have one bit pattern for them. None: the
# dtype has no NaN and no infinity. Bit patterns are used because numpy has no bfloat16 and float8.
_NONFINITE: dict[str, tuple[str, int, int] | None] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "F16": ("<u2", 0x7C00, 0x7C00),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
} | dict.fromkeys(
    ("F4", "F6_E2M3", "F6_E3M2", "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
)


class TensorFact(Frozen):
    """What the header says about a tensor: shape, dtype and size.

    ``dtype`` is the safetensors name (``F32``, ``BF16``).
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int = Field(ge=0)


class StoredTensor(Frozen):
    """A tensor in a shard.

    Attributes:
        shard: path of the file.
        start: offset of the tensor's first byte in the file.
        fact: shape, dtype and size.
    """

    shard: Path
    start: int
    fact: TensorFact


def list_folder(folder: Path) -> list[Path]:
    """Return the paths in a folder, sorted by name.

    Raises:
        BundleRefused: ``folder`` is not a readable folder.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as fault:
        raise BundleRefused(
            "folder_unreadable", folder=escape_message(folder), problem=fault.strerror
        ) from fault


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """Return the ``*.safetensors`` files of a folder, sorted by name."""
    return tuple(
        path for path in list_folder(folder) if path.suffix == ".safetensors" and path.is_file()
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read the location, shape and dtype of every tensor from the headers of the shards.

    Args:
        folder: a folder with ``*.safetensors`` files and, if there are several, their index; or
            the path of one such file.

    Returns:
        The stored tensor by tensor name.

    Raises:
        BundleRefused: there is no tensor, a header is malformed, a tensor is in two shards, or the
            index is missing or differs from the headers.
    """
    if folder.is_file():
        return _read_header(folder)
    shards = tensor_files(folder)
    tensors: dict[str, StoredTensor] = {}
    problems: list[Reason] = []
    for shard in shards:
        for name, stored in _read_header(shard).items():
            if name in tensors:
                problems.append(
                    Reason(
                        "tensor_in_two_shards",
                        tensor=shorten(name),
                        first=tensors[name].shard.name,
                        second=shard.name,
                    )
                )
            tensors[name] = stored
    if not tensors:
        raise BundleRefused("tensors_missing", folder=str(folder))
    raise_if_any(folder, problems)
    if (folder / INDEX).exists():
        raise_if_any(folder, _find_index_problems(folder, tensors))
    elif len(shards) > 1:
        raise BundleRefused("index_missing", folder=str(folder), shards=len(shards), index=INDEX)
    return tensors


def nonfinite_problem(name: str, stored: StoredTensor, buffer: bytearray) -> Reason | None:
    """Check a tensor for NaN and infinite weights.

    Args:
        name: name of the tensor, for the message.
        stored: where the tensor is stored.
        buffer: memory to read blocks into; its length is a multiple of 8 bytes.

    Returns:
        A reason with the number of such weights and the index of the first; None if all are finite.

    Raises:
        BundleRefused: the dtype is unknown, or the file shrank during the check.
    """
    fact = stored.fact
    if fact.dtype not in _NONFINITE:
        raise BundleRefused("dtype_unknown", file=str(stored.shard), dtype=fact.dtype)
    pattern = _NONFINITE[fact.dtype]
    if pattern is None:
        return None
    integer, mask, value = np.dtype(pattern[0]), pattern[1], pattern[2]
    first_index, count, bytes_read = -1, 0, 0
    # Not memory-mapped, because a mapped file that shrinks would kill the process (SIGBUS).
    with stored.shard.open("rb") as file:
        file.seek(stored.start)
        while bytes_read < fact.bytes:
            view = memoryview(buffer)[: min(len(buffer), fact.bytes - bytes_read)]
            if file.readinto(view) != len(view):
                raise BundleRefused("shard_ended_early", file=str(stored.shard))
            is_nonfinite = (np.frombuffer(view, integer) & integer.type(mask)) == integer.type(
                value
            )
            if is_nonfinite.any():
                if first_index < 0:
                    first_index = bytes_read // integer.itemsize + int(is_nonfinite.argmax())
                count += int(np.count_nonzero(is_nonfinite))
            bytes_read += len(view)
    if not count:
        return None
    first_index //= 2 if fact.dtype == "C64" else 1  # two integers per complex weight
    place = tuple(int(i) for i in np.unravel_index(first_index, fact.shape))
    return Reason("weights_not_finite", tensor=shorten(name), count=count, place=place)


def pickle_problem(path: Path) -> Reason | None:
    """Return a reason if the name or the first bytes of a file are those of a pickle; else None.

    A safetensors file whose header has 640 bytes also begins with the bytes ``80 02`` of a pickle.
    So a file that can be a safetensors file is not refused here; the safetensors library checks it.
    """
    if not path.is_file():
        return None
    if path.name.lower().endswith(PICKLE_SUFFIXES):
        return Reason("file_named_like_pickle", file=shorten(path.name))
    if path.suffix not in (".safetensors", ".json"):
        return None
    with path.open("rb") as file:
        head = file.read(256)
        size = file.seek(0, os.SEEK_END)
    # A safetensors file begins with the length of its header (8 bytes), a JSON object.
    header_fits = int.from_bytes(head[:8], "little") <= size - 8 and head[8:9] == b"{"
    if header_fits or not _PICKLE.match(head):
        return None
    return Reason("file_is_pickle", file=shorten(path.name))


def draft_file_problem(path: Path) -> Reason | None:
    """Return why a file of a draft cannot be part of a bundle; None if it can.

    A draft is the folder with ``model.json`` and weights that a user writes, and that ``pack``
    stores as a bundle.
    """
    if not path.is_file() and ".safetensors" in path.name:
        file = shorten(path.name)
        if path.is_dir():
            return Reason("weights_are_folder", file=file)
        if path.is_symlink():
            return Reason("weights_are_broken_link", file=file)
        return Reason("weights_are_special", file=file)
    return pickle_problem(path)


def _read_header(shard: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a shard from its header.

    The safetensors library validates the header but does not return offsets, so the offsets are
    read from the JSON text of the header.
    """
    if problem := pickle_problem(shard):
        raise BundleRefused("unusable", place=str(shard.parent), problems=(problem,))
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if MAX_JSON_BYTES < length <= shard.stat().st_size - 8:
            raise BundleRefused(
                "header_too_large", file=str(shard), size=length, most_bytes=MAX_JSON_BYTES
            )
        raw = file.read(min(length, MAX_JSON_BYTES))
    try:
        check_limits(raw)  # before a parser allocates memory for the values
        with safe_open(shard, framework="numpy") as header_reader:
            names = set(header_reader.keys())
    except (SafetensorError, ValueError) as fault:
        raise BundleRefused(
            "not_safetensors", file=str(shard), problem=escape_message(fault)
        ) from fault
    header = decode(raw, shard)
    header.pop("__metadata__", None)
    if set(header) != names:  # two JSON parsers read the header differently
        raise BundleRefused("header_ambiguous", file=str(shard))
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        fact = TensorFact(shape=tuple(entry["shape"]), dtype=entry["dtype"], bytes=end - start)
        tensors[name] = StoredTensor(shard=shard, start=8 + length + start, fact=fact)
    return tensors


def _find_index_problems(folder: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[Reason]:
    """Yield the differences between the index and the tensors in the shards' headers."""
    weight_map = read_json(folder / INDEX)[1].get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        yield Reason("index_form", index=INDEX)
        return
    shards = {stored.shard.name for stored in tensors.values()}
    for file in sorted(set(weight_map.values()) - shards):
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            yield Reason("index_file_outside", index=INDEX, file=shorten(file))
        else:
            yield Reason("index_file_missing", index=INDEX, file=shorten(file))
    for name, file in weight_map.items():
        if name not in tensors:
            yield Reason("index_tensor_missing", index=INDEX, tensor=shorten(name))
        elif file in shards and file != tensors[name].shard.name:
            yield Reason(
                "index_tensor_elsewhere",
                index=INDEX,
                tensor=shorten(name),
                file=shorten(file),
                shard=tensors[name].shard.name,
            )
    for name, stored in tensors.items():
        if name not in weight_map:
            shard = stored.shard.name
            yield Reason("index_without_tensor", index=INDEX, tensor=shorten(name), shard=shard)
