"""``canaries.find_secrets`` finds planted secrets in every form, and nothing else."""

import base64
import gzip
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from canaries import canaries, find_secrets

PLANTED = canaries()
SECRET = PLANTED.of("MLFLOW_TRACKING_URI")


@pytest.mark.parametrize(
    "write",
    [
        lambda secret: f"http://user:{secret}@host",
        lambda secret: f"http://user:{quote(secret, safe='')}@host",
        lambda secret: json.dumps({"a": secret}),
        lambda secret: repr([secret]),
        # 5, 3, 4 and 14 bytes are before the secret: its base64 text depends on them modulo 3.
        lambda secret: base64.b64encode(f"user:{secret}".encode()).decode(),
        lambda secret: base64.b64encode(f"me:{secret}".encode()).decode(),
        lambda secret: base64.b64encode(f"you:{secret}".encode()).decode(),
        lambda secret: base64.b64encode(json.dumps({"password": secret}).encode()).decode(),
    ],
)
@pytest.mark.parametrize("place", ["text", "file", "gzip", "database"])
def test_find_secrets_finds_a_secret_in_every_form_and_place(
    tmp_path: Path, write: Callable[[str], str], place: str
) -> None:
    text = "before " + write(SECRET) + " after"
    texts = {}
    if place == "text":
        texts = {"stdout": text}
    elif place == "file":
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "log").write_text(text)
    elif place == "gzip":
        (tmp_path / "log.gz").write_bytes(gzip.compress(text.encode()))
    else:
        with sqlite3.connect(tmp_path / "a.db") as database:
            database.execute("CREATE TABLE log (message TEXT)")
            # SQLite stores this text on several pages of 4,096 bytes, which may split the secret.
            database.execute("INSERT INTO log VALUES (?)", ("x" * 4_000 + text + "y" * 9_000,))
        database.close()
    lines = find_secrets(PLANTED, [tmp_path], texts)
    assert lines
    assert all(line.startswith("MLFLOW_TRACKING_URI in ") for line in lines)


def test_find_secrets_finds_nothing_in_files_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("http://***@host canary" * 100)
    assert find_secrets(PLANTED, [tmp_path], {"stdout": "***"}) == []
