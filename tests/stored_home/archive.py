"""A fixture's home as files of the repository: packed in a fixed order, unpacked safely.

A home is stored without its place: references in it are relative to the store's root, so nothing is
rewritten when it is unpacked. The archive is cut into parts because the repository takes no file
over 1 MB.
"""

import io
import lzma
import tarfile
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
PART_BYTES = 900_000
LARGEST_HOME = 100_000_000
"""Bytes of an unpacked home: more is refused, a damaged archive could fill the disk."""


def fixtures() -> tuple[Path, ...]:
    """The folders of all stored homes, oldest first."""
    return tuple(sorted(path for path in FIXTURES.iterdir() if path.is_dir()))


def pack(home: Path, into: Path) -> int:
    """Write ``home`` as ``home.tar.xz.1`` and so on; returns the bytes of all parts.

    Names are sorted, and times and owners are left out: the same files give the same bytes.
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(home.rglob("*")):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ValueError(f"expected files and folders only, got {path}")
            entry = tarfile.TarInfo(path.relative_to(home).as_posix())
            entry.mode = 0o755 if path.is_dir() else 0o644
            if path.is_dir():
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
                continue
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    body = lzma.compress(plain.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    for number, begin in enumerate(range(0, len(body), PART_BYTES), start=1):
        (into / f"home.tar.xz.{number}").write_bytes(body[begin : begin + PART_BYTES])
    return len(body)


def unpack(fixture: Path, into: Path) -> None:
    """Write a fixture's home below ``into``, which is created.

    Raises:
        ValueError: the home is larger than any that was stored.
        tarfile.FilterError: an entry is a link, a device, or leads out of ``into``.
    """
    parts = sorted(fixture.glob("home.tar.xz.*"), key=lambda path: int(path.suffix[1:]))
    body = b"".join(path.read_bytes() for path in parts)
    plain = lzma.LZMADecompressor().decompress(body, max_length=LARGEST_HOME)
    if len(plain) == LARGEST_HOME:
        raise ValueError(f"expected less than {LARGEST_HOME} bytes in {fixture}")
    into.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        tar.extractall(into, filter="data")
