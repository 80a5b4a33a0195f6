"""Pack the home of a fixture in a reproducible archive, and extract it safely.

A home is the folder with the store and the registry of recpress. A fixture is a stored home of an
earlier version, with expected results. The archive also has the files that were made with the home:
drafts, orders, table files and a Triton repository. The home is its folder ``recpress``. References
in a home are relative to the store's root, so a home can be unpacked to any folder without changes.
The archive is split into parts, because the repository accepts no file over 1 MB.
"""

import io
import lzma
import tarfile
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
PART_BYTES = 900_000
MAX_HOME_BYTES = 100_000_000
"""Largest accepted size of an unpacked home; a damaged archive could fill the disk."""


def fixtures() -> tuple[Path, ...]:
    """Return the folders of all fixtures, oldest first."""
    return tuple(sorted(path for path in FIXTURES.iterdir() if path.is_dir()))


def pack(home: Path, into: Path) -> int:
    """Write ``home`` to the files ``into/home.tar.xz.1``, ``.2``, ...; return their total bytes.

    Names are sorted, and times and owners are omitted, so equal files give equal archives.

    Raises:
        ValueError: the home contains something other than files and folders.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
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
    body = lzma.compress(archive.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    for number, start in enumerate(range(0, len(body), PART_BYTES), start=1):
        (into / f"home.tar.xz.{number}").write_bytes(body[start : start + PART_BYTES])
    return len(body)


def unpack(fixture: Path, into: Path) -> None:
    """Unpack a fixture's home to ``into``, which must not exist.

    Raises:
        ValueError: the unpacked home is larger than ``MAX_HOME_BYTES``.
        tarfile.FilterError: an entry is a link, a device, or outside of ``into``.
    """
    parts = sorted(fixture.glob("home.tar.xz.*"), key=lambda path: int(path.suffix[1:]))
    body = b"".join(path.read_bytes() for path in parts)
    archive = lzma.LZMADecompressor().decompress(body, max_length=MAX_HOME_BYTES)
    if len(archive) == MAX_HOME_BYTES:
        raise ValueError(f"expected less than {MAX_HOME_BYTES} bytes in {fixture}")
    into.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(into, filter="data")
