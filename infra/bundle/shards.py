"""A bundle's ``*.safetensors`` files: offset, dtype and shape of each tensor, and finiteness.

The safetensors library validates headers. Weights are read block by block as plain bytes, so a
check needs neither torch nor the memory of a whole table.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from pydantic import Field
from safetensors import SafetensorError, safe_open

from compressors.contracts import Frozen
from compressors.contracts.reasons import Reason
from infra.bundle.json_limits import MAX_JSON_BYTES, check_limits
from infra.bundle.json_reader import clean, decode, read_json, refuse_if, short
from infra.errors import BundleRefused

INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 16 << 20

PICKLE_ENDINGS = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib")

# Protocol 2-5, protocol 0 (dict, list, instance, global), and zip: what torch.save writes.
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\((?:d|l|i)|c[A-Za-z_][\w.]*\n[\w.]+\n|PK[\x03\x05]")

# dtype -> (word, mask, value): a weight is NaN or infinite where ``word & mask == value``. For
# the IEEE-like formats that is "exponent all ones"; the others have their own single pattern.
# None: the format has neither. Bit patterns, because numpy has no bfloat16 or float8.
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
    """Shape, dtype and size of a tensor; ``dtype`` is safetensors' name (``F32``, ``BF16``)."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int = Field(ge=0)


class StoredTensor(Frozen):
    """A tensor and the offset of its first byte in its shard."""

    shard: Path
    start: int
    fact: TensorFact


def listing(folder: Path) -> list[Path]:
    """List the entries of a folder by name.

    Raises:
        BundleRefused: it is not a readable folder.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as fault:
        raise BundleRefused(
            "folder_unreadable", folder=clean(folder), problem=fault.strerror
        ) from fault


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """List the ``*.safetensors`` shards of a folder by name; the index (``INDEX``) is not one."""
    return tuple(p for p in listing(folder) if p.suffix == ".safetensors" and p.is_file())


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read every tensor's offset from the shards' headers; checks that shards and index agree.

    Args:
        folder: folder of shards, or one file.

    Raises:
        BundleRefused: a header is malformed, a tensor is in two shards, the index disagrees.
    """
    if folder.is_file():
        return _header(folder)
    shards = tensor_files(folder)
    found: dict[str, StoredTensor] = {}
    problems: list[Reason] = []
    for shard in shards:
        for name, stored in _header(shard).items():
            if name in found:
                problems.append(
                    Reason(
                        "tensor_in_two_shards",
                        tensor=short(name),
                        first=found[name].shard.name,
                        second=shard.name,
                    )
                )
            found[name] = stored
    if not found:
        raise BundleRefused("tensors_missing", folder=str(folder))
    refuse_if(folder, problems)
    if (folder / INDEX).exists():
        refuse_if(folder, _index_problems(folder, found))
    elif len(shards) > 1:
        raise BundleRefused("index_missing", folder=str(folder), shards=len(shards), index=INDEX)
    return found


def nonfinite_problem(name: str, stored: StoredTensor, buffer: bytearray) -> Reason | None:
    """Return the problem if a tensor has NaN or infinite weights; reads it through ``buffer``.

    Raises:
        BundleRefused: the dtype is unknown, or the file shrank during the check.
    """
    fact = stored.fact
    if fact.dtype not in _NONFINITE:
        raise BundleRefused("dtype_unknown", file=str(stored.shard), dtype=fact.dtype)
    pattern = _NONFINITE[fact.dtype]
    if pattern is None:
        return None
    word, mask, value = np.dtype(pattern[0]), pattern[1], pattern[2]
    first, count, done = -1, 0, 0
    # Read, not mapped: a mapped file that shrinks during the check would kill the process.
    with stored.shard.open("rb") as file:
        file.seek(stored.start)
        while done < fact.bytes:
            view = memoryview(buffer)[: min(len(buffer), fact.bytes - done)]
            if file.readinto(view) != len(view):
                raise BundleRefused("shard_ended_early", file=str(stored.shard))
            bad = (np.frombuffer(view, word) & word.type(mask)) == word.type(value)
            if bad.any():
                if first < 0:
                    first = done // word.itemsize + int(bad.argmax())
                count += int(np.count_nonzero(bad))
            done += len(view)
    if not count:
        return None
    first //= 2 if fact.dtype == "C64" else 1  # two words a weight
    place = tuple(int(i) for i in np.unravel_index(first, fact.shape))
    return Reason("weights_not_finite", tensor=short(name), count=count, place=place)


def pickle_problem(path: Path) -> Reason | None:
    """Return the problem if a file's name or first bytes are those of a pickle.

    A safetensors header of 640 bytes begins with ``80 02``, as a pickle does, so the safetensors
    library checks every file that can be one.
    """
    if not path.is_file():
        return None
    if path.name.lower().endswith(PICKLE_ENDINGS):
        return Reason("file_named_like_pickle", file=short(path.name))
    if path.suffix not in (".safetensors", ".json"):
        return None
    with path.open("rb") as file:
        head = file.read(256)
        size = file.seek(0, 2)
    header_fits = int.from_bytes(head[:8], "little") <= size - 8 and head[8:9] == b"{"
    if header_fits or not _PICKLE.match(head):
        return None
    return Reason("file_is_pickle", file=short(path.name))


def draft_file_problem(path: Path) -> Reason | None:
    """Why a file next to a draft's ``model.json`` cannot be packed, or None."""
    if not path.is_file() and ".safetensors" in path.name:
        file = short(path.name)
        if path.is_dir():
            return Reason("weights_are_folder", file=file)
        if path.is_symlink():
            return Reason("weights_are_broken_link", file=file)
        return Reason("weights_are_special", file=file)
    return pickle_problem(path)


def _header(shard: Path) -> dict[str, StoredTensor]:
    """Read a shard's header: validated by the safetensors library, offsets from the raw header."""
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
        check_limits(raw)  # before a parser allocates the values
        with safe_open(shard, framework="numpy") as opened:
            names = set(opened.keys())
    except (SafetensorError, ValueError) as fault:
        raise BundleRefused("not_safetensors", file=str(shard), problem=clean(fault)) from fault
    header = decode(raw, shard)
    header.pop("__metadata__", None)
    if set(header) != names:  # so that no two JSON parsers read two different models
        raise BundleRefused("header_ambiguous", file=str(shard))
    found: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        fact = TensorFact(shape=tuple(entry["shape"]), dtype=entry["dtype"], bytes=end - start)
        found[name] = StoredTensor(shard=shard, start=8 + length + start, fact=fact)
    return found


def _index_problems(folder: Path, found: Mapping[str, StoredTensor]) -> Iterator[Reason]:
    """Return the differences between the index and the shards' headers."""
    weight_map = read_json(folder / INDEX)[1].get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        yield Reason("index_form", index=INDEX)
        return
    shards = {stored.shard.name for stored in found.values()}
    for file in sorted(set(weight_map.values()) - shards):
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            yield Reason("index_file_outside", index=INDEX, file=short(file))
        else:
            yield Reason("index_file_missing", index=INDEX, file=short(file))
    for name, file in weight_map.items():
        if name not in found:
            yield Reason("index_tensor_missing", index=INDEX, tensor=short(name))
        elif file in shards and file != found[name].shard.name:
            yield Reason(
                "index_tensor_elsewhere",
                index=INDEX,
                tensor=short(name),
                file=short(file),
                shard=found[name].shard.name,
            )
    for name, stored in found.items():
        if name not in weight_map:
            shard = stored.shard.name
            yield Reason("index_without_tensor", index=INDEX, tensor=short(name), shard=shard)
