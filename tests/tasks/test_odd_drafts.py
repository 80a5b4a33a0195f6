"""Drafts with unusable files: packing is refused with a message, and nothing is stored.

A draft is a folder from which a bundle is packed. Its weights may be several safetensors files with
an index of their tensors, and a split of its data may be a folder of parquet files, its parts. A
vocabulary is a file or folder that is stored unchanged with the model.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from drafts import ALLOWED, ROOT, environment, write_draft
from error_codes import raises_code
from safetensors import SafetensorError

from flows.cli import errors as cli_errors
from infra.errors import (
    BundleRefused,
    ConcurrentChange,
    DataRefused,
    FileRefused,
    InfraError,
    OutOfMemory,
    Refused,
    SettingRefused,
    StoreUnavailable,
)
from infra.store import chunks
from infra.store.disk import find_os_error, translate_input_error, translate_os_error
from tasks.bundles.packing import check, pack, show
from tasks.bundles.table_files import build_table_step, quantize
from tasks.orchestration.workspace import store

ROWS = {"train": 200, "test": 200}
UNPRIVILEGED_USER = 65_534  # the user "nobody"


@pytest.fixture(scope="session")
def session_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_draft(tmp_path_factory.mktemp("drafts") / "draft", rows=ROWS)


@pytest.fixture
def draft(session_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    return Path(shutil.copytree(session_draft, tmp_path / "draft"))


def add_files(folder: Path, section: str, entries: dict[str, str]) -> None:
    """Add entries (paths by name) to the section ``data`` or ``vocabularies`` of ``model.json``."""
    document = json.loads((folder / "model.json").read_text())
    document[section] = {**document.get(section, {}), **entries}
    (folder / "model.json").write_text(json.dumps(document))


# The next functions return a change: a function that takes the draft's folder and modifies it.


def with_test_data_at(path: str) -> Callable[[Path], None]:
    """Return a change that replaces the path of the test split in ``model.json``."""
    return lambda draft: add_files(draft, "data", {"test": path})


def with_vocabulary_at(path: str) -> Callable[[Path], None]:
    """Return a change that adds a vocabulary with this path to ``model.json``."""
    return lambda draft: add_files(draft, "vocabularies", {"v": path})


def replace_by(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a change that deletes a file and calls ``make`` with its path."""

    def change(draft: Path) -> None:
        (draft / name).unlink(missing_ok=True)
        make(draft / name)

    return change


def replace_by_parts(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a change that makes the test split a folder with one valid part file.

    Args:
        make: adds something to the folder; receives its path.
    """

    def change(draft: Path) -> None:
        (draft / "parts").mkdir()
        (draft / "test.parquet").rename(draft / "parts" / "a.parquet")
        make(draft / "parts")
        with_test_data_at("parts")(draft)

    return change


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def apply_all(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return a change that makes several changes in order."""

    def change(draft: Path) -> None:
        for each_change in changes:
            each_change(draft)

    return change


# Changes after which a draft cannot be packed.
UNUSABLE: dict[str, Callable[[Path], Any]] = {
    "a folder named like weights": lambda d: (d / "x.safetensors").mkdir(),
    "a folder whose name contains that of weights": lambda d: (d / "x.safetensors.d").mkdir(),
    "a folder for the weights": replace_by("model.safetensors", Path.mkdir),
    "a broken link for weights": lambda d: link_to_nothing(d / "x.safetensors"),
    "a link to itself for weights": replace_by("model.safetensors", link_to_itself),
    "a pipe for weights": replace_by("model.safetensors", os.mkfifo),
    "empty weights": replace_by("model.safetensors", Path.touch),
    "a folder for the index": lambda d: (d / "model.safetensors.index.json").mkdir(),
    "an empty index": lambda d: (d / "model.safetensors.index.json").touch(),
    "a folder for model.json": replace_by("model.json", Path.mkdir),
    "a link to itself for model.json": replace_by("model.json", link_to_itself),
    "a pipe for model.json": replace_by("model.json", os.mkfifo),
    "an empty model.json": replace_by("model.json", Path.touch),
    **{
        f"data {text}": with_test_data_at(text)
        for text in ("/", "//", "/.", ".", "./", "..", "~", "/dev/null")
    },
    "data of the parent": lambda d: with_test_data_at(str(d.parent))(d),
    "data is a long name": with_test_data_at("x" * 300),
    "data is a long path": with_test_data_at("/".join(["x" * 200] * 30)),
    "empty data": replace_by("test.parquet", Path.touch),
    "an empty folder for data": replace_by("test.parquet", Path.mkdir),
    "a link to itself for data": replace_by("test.parquet", link_to_itself),
    "a broken link for data": replace_by("test.parquet", link_to_nothing),
    "a pipe for data": replace_by("test.parquet", os.mkfifo),
    "a pipe among parts": replace_by_parts(lambda d: os.mkfifo(d / "b.parquet")),
    # Files whose names begin with an underscore are not read, but are checked.
    "a pipe that is no part": replace_by_parts(lambda d: os.mkfifo(d / "_b")),
    "a link among parts": replace_by_parts(lambda d: (d / "_b").symlink_to(d / "a.parquet")),
    "a folder named like a part": replace_by_parts(lambda d: (d / "b.parquet").mkdir()),
    "the root as vocabulary": with_vocabulary_at("/"),
    "the draft as vocabulary": with_vocabulary_at("."),
    "a pipe as vocabulary": apply_all(lambda d: os.mkfifo(d / "v"), with_vocabulary_at("v")),
    "an empty folder as vocabulary": apply_all(
        lambda d: (d / "v").mkdir(), with_vocabulary_at("v")
    ),
    "a link in a vocabulary": apply_all(
        lambda d: (d / "v").mkdir(),
        lambda d: link_to_nothing(d / "v" / "w"),
        with_vocabulary_at("v"),
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_file_in_a_draft_is_refused_and_nothing_is_packed(kind: str, draft: Path) -> None:
    UNUSABLE[kind](draft)
    with pytest.raises((BundleRefused, DataRefused, FileRefused, Refused)) as refused:
        pack(draft)
    assert not isinstance(refused.value, SettingRefused)  # the draft is at fault, not a setting
    assert "Errno" not in str(refused.value)  # the message is not that of Python
    assert store().keys("bundles/") == ()


def test_folder_of_part_files_is_packed_unchanged(draft: Path) -> None:
    replace_by_parts(lambda folder: (folder / "notes.txt").write_text("not a part"))(draft)
    packed = pack(draft)
    manifest = show("clicks@1")
    reference = manifest.data["test"]
    paths = {entry.path for entry in store().manifest(reference.artifact).files}
    assert (packed.rows["test"], paths) == (200, {"parts/a.parquet", "parts/notes.txt"})


# --- files that may not be read ---------------------------------------------------------------


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run as an unprivileged user, since root can read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(UNPRIVILEGED_USER)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    "name", ["model.json", "model.safetensors", "test.parquet", "extra.json", "v.txt", "."]
)
def test_unreadable_file_is_refused_with_its_name_and_the_remedy(
    name: str, session_draft: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    # pytest's folders are only accessible to their owner, so the unprivileged user needs access.
    top = Path(tmp_path_factory.getbasetemp())
    shared = top / f"unreadable-{name}-{os.getpid()}"
    shared.mkdir()
    for folder in (shared, *(p for p in shared.parents if p.is_relative_to(top.parent))):
        folder.chmod(folder.stat().st_mode | 0o055)  # group and others may list and enter it
    folder = Path(shutil.copytree(session_draft, shared / "draft"))
    (folder / "extra.json").write_text("{}")
    (folder / "v.txt").write_text("x")
    with_vocabulary_at("v.txt")(folder)
    (shared / "recpress").mkdir()
    (shared / "recpress").chmod(0o777)
    monkeypatch.setenv("RECPRESS_HOME", str(shared / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    (folder / name).chmod(0)
    try:
        with unprivileged(), pytest.raises((FileRefused, BundleRefused, DataRefused)) as refused:
            pack(folder)
    finally:
        (folder / name).chmod(0o755)
    assert Path(name).name in str(refused.value)
    assert "permission" in str(refused.value).lower()
    assert store().keys("bundles/") == ()


# --- limits of the machine --------------------------------------------------------------------


# Limits of the size of each file, in bytes. With each of them another file is the first too large.
# tests/faults/test_full_disk.py has a lower one in the default tier.
@pytest.mark.parametrize("limit", [330_000, pytest.param(20_000, marks=pytest.mark.nightly)])
@pytest.mark.slow
def test_packing_beyond_the_file_size_limit_fails_without_losing_bundles(
    limit: int, draft: Path, tmp_path: Path
) -> None:
    """The limit decides which write fails: to the scratch folder, the store, or its entry."""
    before = pack(write_draft(tmp_path / "before", version="0", rows=ROWS, seed=1))
    env = environment(tmp_path)
    packing = subprocess.run(
        [sys.executable, "-m", "flows.cli.app", "bundle", "pack", str(draft)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert packing.returncode == 1, packing.stderr
    assert "Traceback" not in packing.stderr
    assert "ulimit -f" in packing.stderr or "TMPDIR" in packing.stderr
    assert store().keys("bundles/") == ("bundles/clicks/0.json",)
    assert list((tmp_path / "recpress" / "store" / ".tmp").iterdir()) == []
    check("clicks@0")
    assert pack(draft).version == "1"
    assert pack(tmp_path / "before") == before


def test_file_that_changes_during_packing_is_not_stored(
    draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_files = chunks.hash_files

    def hash_then_change(folder: Path, *arguments: Any) -> Any:
        entries = hash_files(folder, *arguments)
        for path in folder.rglob("*.parquet"):
            with path.open(
                "ab"
            ) as file:  # packing hashes a hard link, so this changes the draft too
                file.write(b"more")
        return entries

    monkeypatch.setattr("infra.store.object_store.hash_files", hash_then_change)
    with raises_code(ConcurrentChange, "file_changed"):
        pack(draft)
    assert store().keys("bundles/") == ()


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreUnavailable),
        (errno.EDQUOT, StoreUnavailable),
        (errno.EFBIG, StoreUnavailable),
        (errno.EMFILE, StoreUnavailable),
        (errno.ENOMEM, OutOfMemory),
        (errno.EIO, StoreUnavailable),
        (errno.EROFS, SettingRefused),
        (errno.EACCES, FileRefused),
        (errno.EPERM, FileRefused),
        (errno.ENOENT, FileRefused),
        (errno.ENOTDIR, FileRefused),
        (errno.EISDIR, FileRefused),
        (errno.ELOOP, FileRefused),
        (errno.ENAMETOOLONG, FileRefused),
    ],
)
def test_os_error_is_translated_with_path_and_remedy(
    number: int,
    expected: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault = OSError(number, os.strerror(number), "/srv/some/file")
    error = translate_input_error(fault)
    assert type(error) is expected
    assert "/srv/some/file" in str(error)
    assert str(error).rstrip().endswith(".")
    assert isinstance(translate_os_error(fault, Path("/srv"), "write"), Refused | InfraError)
    exit_code = 1 if issubclass(expected, InfraError) else 2
    assert cli_errors.report_error(fault) == exit_code
    assert "Errno" not in capsys.readouterr().err


def test_os_error_in_a_safetensors_message_is_recognized() -> None:
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    error = find_os_error(SafetensorError(text))
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert find_os_error(SafetensorError("header too small")) is None
    assert find_os_error(ValueError(text)) is None


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 30)])
def test_name_longer_than_the_file_system_allows_is_refused(name: str, draft: Path) -> None:
    for function in (
        lambda: pack(Path(name)),
        lambda: check(name),
        lambda: show(name),
        lambda: quantize(Path(name), draft / "q", build_table_step("int8", {})),
        lambda: quantize(draft / "model.safetensors", Path(name), build_table_step("int8", {})),
    ):
        with pytest.raises(Refused):
            function()
