"""Canaries: synthetic secrets planted in every place for a credential, and the search for them.

``plant`` gives the environment, ``traces`` the places where a secret appeared although it should
not. A secret counts in each form in which programs write it: as it is, percent-encoded, as a
JSON or Python string, and in base64 at any offset. Databases are read row by row as well as byte
by byte, because SQLite splits long texts over pages.
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
    """One secret for each variable, with characters that have to be encoded in an address."""

    values: Mapping[str, str]

    def of(self, name: str) -> str:
        """The secret as it is."""
        return self.values[name]

    def in_address(self, name: str) -> str:
        """The secret as an address must write it."""
        return quote(self.values[name], safe="")


def canaries(names: Iterable[str] = SECRETS) -> Canaries:
    """New secrets: each is recognized by the name in it."""
    return Canaries({name: f"cnry/{name.lower().replace('_', '-')}%+é=9" for name in names})


def forms(secret: str) -> set[bytes]:
    """Every way in which a program may write a secret down."""
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
    # The middle of the secret suffices: what frames it may have been cut or encoded otherwise.
    middle = secret[secret.index("/") + 1 : secret.index("%")]
    found = {text.encode() for text in texts} | {middle.encode()}
    for body in (raw, raw.replace("é".encode(), b"")):
        for offset in range(3):
            encoded = base64.b64encode(b"\0" * offset + body)
            # The first and last characters depend on what is next to the secret.
            found.add(encoded[4 if offset else 0 : -4])
    return found


def traces(planted: Canaries, folders: Iterable[Path], texts: Mapping[str, str]) -> list[str]:
    """Where a secret is written: each as "which secret, in what, near which words"."""
    found = []
    bodies = [(name, text.encode("utf-8", "surrogatepass")) for name, text in texts.items()]
    wanted = {name: forms(secret) for name, secret in planted.values.items()}
    for place, body in (*bodies, *_bodies(folders)):
        for name, variants in wanted.items():
            for variant in variants:
                at = body.find(variant)
                if at >= 0:
                    near = body[max(0, at - 80) : at + 60].decode(errors="replace")
                    found.append(f"{name} in {place}: {near!r}")
                    break
    return found


def _bodies(folders: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            body = path.read_bytes()
            yield str(path), body
            if body.startswith(b"SQLite format 3\0"):
                yield from _rows(path)
            elif body.startswith(b"\x1f\x8b"):
                yield f"{path} (unpacked)", gzip.decompress(body)
            elif body.startswith(b"PK\x03\x04"):
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield f"{path}!{name}", archive.read(name)


def _rows(path: Path) -> Iterator[tuple[str, bytes]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            rows: list[bytes] = []
            with suppress(sqlite3.OperationalError):  # virtual tables of a module that is not here
                for row in database.execute(f'SELECT * FROM "{name}"'):  # noqa: S608
                    rows += [
                        cell if isinstance(cell, bytes) else str(cell).encode() for cell in row
                    ]
            yield f"{path}: table {name}", b"\n".join(rows)
