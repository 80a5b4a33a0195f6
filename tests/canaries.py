"""Canaries: synthetic secrets for tests that search files and outputs for leaked credentials.

``canaries`` creates one secret per credential variable. ``find_secrets`` searches folders and texts
for each form in which programs write a secret: plain, percent-encoded, as a JSON or Python string,
and in base64 at any offset. It also reads databases row by row, because SQLite splits long texts
over pages.
"""

import base64
import gzip
import json
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus

# Variables that are a secret, or an address that may contain one.
SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "RECPRESS_STORE",
    "RECPRESS_TRITON",
)


@dataclass(frozen=True)
class Canaries:
    """One secret for each variable, with characters that must be encoded in a URL."""

    values: Mapping[str, str]

    def of(self, name: str) -> str:
        """Return the secret of the variable ``name``."""
        return self.values[name]

    def in_address(self, name: str) -> str:
        """Return the percent-encoded secret of a variable, for use in a URL."""
        return quote(self.values[name], safe="")


def canaries(names: Iterable[str] = SECRETS) -> Canaries:
    """Create secrets that contain the name of their variable."""
    return Canaries({name: f"cnry/{name.lower().replace('_', '-')}%+é=9" for name in names})


def encoded_forms(secret: str) -> set[bytes]:
    """Return every byte sequence in which a program may write a secret."""
    texts = {
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        quote(quote(secret, safe=""), safe=""),
    }
    raw = secret.encode()
    # The middle alone also counts, since the start and the end may be cut or encoded differently.
    middle = secret[secret.index("/") + 1 : secret.index("%")]
    result = {text.encode() for text in texts} | {middle.encode()}
    # A program may drop the only character that is not ASCII before it encodes the secret.
    for body in (raw, raw.replace("é".encode(), b"")):
        for offset in range(3):
            encoded = base64.b64encode(b"\0" * offset + body)
            # The first and last base64 characters depend on the bytes next to the secret.
            result.add(encoded[4 if offset else 0 : -4])
    return result


def find_secrets(planted: Canaries, folders: Iterable[Path], texts: Mapping[str, str]) -> list[str]:
    """Search folders and texts for secrets: one line per occurrence with variable and context."""
    result = []
    bodies = [(name, text.encode("utf-8", "surrogatepass")) for name, text in texts.items()]
    expected = {name: encoded_forms(secret) for name, secret in planted.values.items()}
    for source, body in (*bodies, *_read_files(folders)):
        for name, variants in expected.items():
            for variant in variants:
                position = body.find(variant)
                if position >= 0:
                    context = body[max(0, position - 80) : position + 60].decode(errors="replace")
                    result.append(f"{name} in {source}: {context!r}")
                    break
    return result


def _read_files(folders: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every file, unpacked archive and table of a database."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            body = path.read_bytes()
            yield str(path), body
            if body.startswith(b"SQLite format 3\0"):
                yield from _read_database(path)
            elif body.startswith(b"\x1f\x8b"):  # gzip
                yield f"{path} (unpacked)", gzip.decompress(body)
            elif body.startswith(b"PK\x03\x04"):  # zip
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield f"{path}!{name}", archive.read(name)


def _read_database(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each table of a SQLite database, and its values."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            rows: list[bytes] = []
            with suppress(sqlite3.OperationalError):  # virtual tables of a missing SQLite module
                for row in database.execute(f'SELECT * FROM "{name}"'):  # noqa: S608
                    rows += [
                        value if isinstance(value, bytes) else str(value).encode() for value in row
                    ]
            yield f"{path}: table {name}", b"\n".join(rows)
