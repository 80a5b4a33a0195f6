"""Settings: the folder ``RECPRESS_HOME`` and the registry's SQLite file, with any path."""

import os
import sqlite3
from pathlib import Path

import pytest
from error_codes import raises_code
from sqlalchemy import create_engine, text

from infra.errors import SettingRefused
from infra.registry.mlflow_registry import Registry
from infra.settings import build_sqlite_uri, load_settings, parse_sqlite_uri, public_uri

UNUSUAL_NAMES = (
    "a?b",
    "?",
    "a?uri=true",
    "file:x?mode=memory",
    "a#b",
    "a%b",
    "a%20b",
    "a%3Fb?c",
    "a b",
    "a&b=c;d",
    "a:b",
    "a'b\"c",
    "~a",
    "a@b",
    "user:secret@host?x",
    "müsli-寿司?",
    "a+b",
    "a\\b",
)


@pytest.mark.parametrize("name", UNUSUAL_NAMES)
def test_build_sqlite_uri_opens_its_file_for_any_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name / "registry.db"
    file.parent.mkdir()
    uri = build_sqlite_uri(file)
    assert parse_sqlite_uri(uri) == file
    engine = create_engine(uri)
    with engine.begin() as connection:
        connection.execute(text("create table t (x integer)"))
    engine.dispose()
    assert sorted(tmp_path.rglob("*")) == sorted({file.parent, file})
    with sqlite3.connect(file) as opened:
        assert opened.execute("select name from sqlite_master").fetchall() == [("t",)]


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////srv/registry.db", "/srv/registry.db"),
        ("sqlite+pysqlite:////srv/registry.db", "/srv/registry.db"),
        ("sqlite:////srv/a%20b/registry.db", "/srv/a%20b/registry.db"),
        ("sqlite:////srv/a/../registry.db", "/srv/registry.db"),
        ("sqlite:////srv/registry.db?timeout=3", "/srv/registry.db"),
        ("sqlite:////srv/registry.db?uri=true", "/srv/registry.db"),
        ("sqlite:///file:/srv/a%3Fb.db?uri=true", "/srv/a?b.db"),
        ("sqlite:///file:///srv/a.db?mode=ro&uri=true", "/srv/a.db"),
        ("sqlite:///file:/srv/a.db?mode=memory&uri=true", None),
        ("sqlite://", None),
        ("sqlite:///", None),
        ("sqlite:///:memory:", None),
        ("postgresql://host/registry.db", None),
        ("http://host/registry.db", None),
        ("/srv/registry.db", None),
    ],
)
def test_parse_sqlite_uri_gives_the_file_that_sqlalchemy_opens(uri: str, file: str | None) -> None:
    assert parse_sqlite_uri(uri) == (None if file is None else Path(file))


def test_parse_sqlite_uri_resolves_a_relative_path_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_sqlite_uri("sqlite:///registry.db") == tmp_path / "registry.db"
    assert parse_sqlite_uri("sqlite:///file:registry.db?uri=true") == tmp_path / "registry.db"


def test_home_with_special_characters_contains_its_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    home = tmp_path / "a?b#c%41%20 d&e=f;g:h'i\"~@ü"
    monkeypatch.setenv("RECPRESS_HOME", str(home))
    registry = Registry(load_settings().registry_uri)
    published = registry.publish("m", "0" * 64, "artifacts/" + "0" * 64, {}, "")
    assert published.version == "1"
    assert (home / "registry.db").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"work", home.name}
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("home", ["x", "x/", "./x/../x", "link/../x", "x//", "y/../x/."])
def test_home_is_normalized_to_one_path(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECPRESS_HOME", home)
    settings = load_settings()
    assert settings.home == tmp_path / "x"
    assert settings.store_root == str(tmp_path / "x" / "store")
    assert parse_sqlite_uri(settings.registry_uri) == tmp_path / "x" / "registry.db"


@pytest.mark.parametrize("home", ["~no-such-user-here/x", os.fsdecode(b"/srv/\xff")])
def test_home_that_is_not_a_valid_path_is_refused(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_HOME", home)
    with raises_code(SettingRefused, "variable_invalid", name="RECPRESS_HOME"):
        load_settings()


def test_public_uri_keeps_the_path_of_a_sqlite_uri() -> None:
    file = Path("/srv/me@work/a?b/registry.db")
    assert public_uri(build_sqlite_uri(file)) == f"sqlite:///{file}"
    assert public_uri("sqlite:////srv/me@work/registry.db") == "sqlite:////srv/me@work/registry.db"
