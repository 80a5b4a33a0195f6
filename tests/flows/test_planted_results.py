"""Malicious files in place of stored task results: none is executed, imported or unpickled.

recpress stores the results of tasks as records. The options ``NO_RESULTS`` of each flow and task
forbid Prefect to store or read results. A block is Prefect's description of a storage. A home is
the folder with everything that recpress stores (``RECPRESS_HOME``).

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import base64
import json
import lzma
import os
import pickle  # noqa: TID251 (to write the files of the attack)
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drafts import write_draft
from error_codes import raises_code
from orders import EVENT_SECONDS, is_final, use_home
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.filesystems import LocalFileSystem
from prefect.settings import get_current_settings, temporary_settings

from compressors.contracts import Artifact, Limit, Verdict
from infra.errors import DataRefused
from infra.settings import load_settings
from infra.store.records import seal_record
from tasks.bundles.packing import pack
from tasks.gate import gate
from tasks.orchestration.result_records import record_key
from tasks.orchestration.task_calls import NO_RESULTS, call, content_key
from tasks.orchestration.workspace import store
from tasks.prepare import prepare

LIMITS = (Limit.parse("bytes vs baseline <= 1"),)
MODULE = "planted_module"

# Settings with which Prefect stores and reads results of tasks that do not forbid it, as pickles.
HOSTILE_SETTINGS: dict[str, Any] = {
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": True,
    "PREFECT_TASKS_DEFAULT_PERSIST_RESULT": True,
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "pickle",
    "PREFECT_TASKS_REFRESH_CACHE": False,
}


@flow(name="two-tasks", **NO_RESULTS)
def two_tasks(bundle: Artifact, code: str) -> tuple[Artifact, Verdict]:
    """Call a task that returns an artifact, and one that returns a value.

    ``code`` is a part of both cache keys.
    """
    prepared = call(prepare, code, bundle=bundle, split="validation")
    return prepared, call(gate, code, target="onnxruntime", limits=LIMITS, measurement=None)


def task_runs() -> list[tuple[str, str]]:
    """Return name and state of each task run of the newest flow run.

    An event reports the end of a task run. It may arrive after the end of the flow run.
    """
    deadline = time.monotonic() + EVENT_SECONDS
    while True:
        with get_client(sync_client=True) as client:
            all_runs = client.read_task_runs(limit=200)
        newest = max(all_runs, key=lambda run: run.created or 0)
        runs = [run for run in all_runs if run.flow_run_id == newest.flow_run_id]
        if all(is_final(run) for run in runs) or time.monotonic() > deadline:
            return sorted((run.name.split("-")[0], run.state_name or "") for run in runs)
        time.sleep(0.2)


# --- planted files ---------------------------------------------------------------------------


class CreatesFolder:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


def prefect_record(kind: str, trap: Path) -> bytes:
    """Return a result in the format of Prefect; decoding it would create the folder ``trap``.

    Args:
        kind: the serializer that the result names. ``json class`` has a class to be imported.
        trap: the folder.
    """
    pickled = pickle.dumps(CreatesFolder(trap))
    serializers: dict[str, Any] = {
        "pickle": {"type": "pickle", "picklelib": "cloudpickle", "picklelib_version": None},
        "compressed/pickle": {
            "type": "compressed",
            "compressionlib": "lzma",
            "serializer": {"type": "pickle"},
        },
        "json class": {"type": "json"},
    }
    results = {
        "pickle": base64.encodebytes(pickled).decode(),
        "compressed/pickle": base64.encodebytes(
            lzma.compress(base64.encodebytes(pickled))
        ).decode(),
        "json class": json.dumps({"__class__": f"{MODULE}.Thing", "data": {}}),
    }
    metadata = {
        "storage_key": None,
        "expiration": None,
        "serializer": serializers[kind],
        "prefect_version": "3.8.8",
        "storage_block_id": None,
    }
    return json.dumps({"metadata": metadata, "result": results[kind]}).encode()


def planted_records(keys: dict[str, str], trap: Path) -> dict[str, dict[str, bytes]]:
    """Return malicious contents for the result records of recpress, by kind of attack and task.

    Sealed records have the right task, key and checksum.
    """
    pickled = base64.encodebytes(pickle.dumps(CreatesFolder(trap))).decode()

    def sealed_record(task: str, value: Any, **more: Any) -> bytes:
        fields = {"schema_version": 1, "task": task, "key": keys[task], "value": value}
        return seal_record({**fields, **more})

    class_reference = {"__class__": f"{MODULE}.Thing", "data": {}}
    return {
        "raw pickle": {task: pickle.dumps(CreatesFolder(trap)) for task in keys},
        "pickle as text": {task: sealed_record(task, pickled) for task in keys},
        "class to import": {task: sealed_record(task, class_reference) for task in keys},
        "exception to import": {
            task: sealed_record(task, {"__exc_type__": f"{MODULE}.Thing", "message": "x"})
            for task in keys
        },
        "class to import, and a serializer": {
            task: sealed_record(task, class_reference, metadata={"serializer": {"type": "pickle"}})
            for task in keys
        },
        "record of Prefect": {task: prefect_record("pickle", trap) for task in keys},
    }


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A path that exists after planted content was executed or imported."""
    path = tmp_path / "executed"
    (tmp_path / "modules").mkdir()
    body = f"import os\nos.mkdir({str(path)!r})\nclass Thing(Exception): ...\n"
    (tmp_path / "modules" / f"{MODULE}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield path
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A home with a packed bundle, and its artifact."""
    home = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home)
        rows = dict.fromkeys(("train", "calibration", "validation", "test"), 200)
        return home, pack(write_draft(home / "draft", rows=rows)).artifact


@pytest.fixture
def bundle(
    packed: tuple[Path, Artifact], prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> Artifact:
    """The packed bundle; sets the environment of this test to its home."""
    use_home(monkeypatch, packed[0])
    return packed[1]


@pytest.fixture
def code() -> str:
    """A unique part of each cache key, so that tests do not share results."""
    return f"code {time.time_ns()}"


def cache_keys(bundle: Artifact, code: str) -> dict[str, str]:
    """Return the cache keys of the tasks of ``two_tasks``."""
    return {
        "prepare": content_key(prepare, code, {"bundle": bundle, "split": "validation"}),
        "gate": content_key(
            gate, code, {"target": "onnxruntime", "limits": LIMITS, "measurement": None}
        ),
    }


# --- results in Prefect's format -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "has_hostile_settings"),
    [("pickle", False), ("pickle", True), ("compressed/pickle", True), ("json class", True)],
    ids=lambda item: {False: "default settings", True: "persist by default"}.get(item, item),
)
def test_planted_results_in_prefects_folders_are_not_read(
    bundle: Artifact,
    code: str,
    trap: Path,
    tmp_path: Path,
    kind: str,
    has_hostile_settings: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = two_tasks(bundle, code)
    for task, key in cache_keys(bundle, code).items():
        record = store().root.removeprefix("file://") + "/" + record_key(task, key)
        Path(record).unlink()  # a result could now only be read from a planted file
    folders = [
        load_settings().home / "results",
        get_current_settings().results.local_storage_path,
        tmp_path / "block",
    ]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
        for task, key in cache_keys(bundle, code).items():
            for name in (f"{task}-{key}", key, record_key(task, key)):
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(prefect_record(kind, trap))
    updates: dict[str, Any] = {}
    if has_hostile_settings:
        LocalFileSystem(basepath=str(tmp_path / "block")).save("planted", overwrite=True)
        block = "local-file-system/planted"
        monkeypatch.setenv("PREFECT_DEFAULT_RESULT_STORAGE_BLOCK", block)
        updates = {**HOSTILE_SETTINGS, "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": block}
    before = files_in(folders)
    with temporary_settings(updates=settings_by_name(updates)):
        assert two_tasks(bundle, code) == expected
    assert not trap.exists()
    assert task_runs() == [("gate onnxruntime", "Completed"), ("prepare validation", "Completed")]
    assert files_in(folders) == before, "Prefect stored a result"


def settings_by_name(updates: dict[str, Any]) -> dict[Any, Any]:
    """Replace the names of Prefect's settings by their objects."""
    import prefect.settings

    return {getattr(prefect.settings, name): value for name, value in updates.items()}


def files_in(folders: list[Path]) -> dict[Path, bytes]:
    """Return the content of every file in the folders."""
    return {
        path: path.read_bytes() for path in folders for path in path.rglob("*") if path.is_file()
    }


class Killed(BaseException):
    """Simulates the end of the process; the code under test does not catch a BaseException."""


@flow(name="failing-flow", **NO_RESULTS)
def failing_flow() -> None:
    raise DataRefused("checks_missing")


def test_prefect_does_not_store_the_exception_of_a_failed_flow(
    work_folder: Path, prefect_server: None
) -> None:
    storage = [get_current_settings().results.local_storage_path]
    before = files_in(storage)
    with raises_code(DataRefused, "checks_missing"):
        failing_flow()
    assert files_in(storage) == before


# --- records of this project -----------------------------------------------------------------


@pytest.mark.parametrize("kind", list(planted_records({"prepare": "0" * 64}, Path("x"))))
def test_planted_record_in_the_store_is_replaced_and_not_executed(
    bundle: Artifact, code: str, trap: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = two_tasks(bundle, code)
    keys = cache_keys(bundle, code)
    folder = store().folder
    assert folder is not None
    valid = {task: (folder / record_key(task, key)).read_bytes() for task, key in keys.items()}
    for task, body in planted_records(keys, trap)[kind].items():
        store().write(record_key(task, keys[task]), body)
    with temporary_settings(updates=settings_by_name(HOSTILE_SETTINGS)):
        assert two_tasks(bundle, code) == expected
    assert not trap.exists()
    assert task_runs() == [("gate onnxruntime", "Completed"), ("prepare validation", "Completed")]
    assert "is damaged" in caplog.text
    for task, key in keys.items():
        assert (folder / record_key(task, key)).read_bytes() == valid[task]


def test_valid_record_is_used_and_the_task_has_state_cached(bundle: Artifact, code: str) -> None:
    expected = two_tasks(bundle, code)
    assert two_tasks(bundle, code) == expected
    assert task_runs() == [("gate onnxruntime", "Cached"), ("prepare validation", "Cached")]


def test_task_killed_before_its_record_was_written_runs_again(
    bundle: Artifact, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("tasks.orchestration.task_calls.write_result", raise_killed)
        with pytest.raises(Killed):
            two_tasks(bundle, code)
    assert cache_keys(bundle, code)["prepare"] not in " ".join(store().keys("results/"))
    artifacts_of_killed_run = store().keys("artifacts/")
    prepared, _ = two_tasks(bundle, code)
    # The same bytes have the same hash.
    assert store().keys("artifacts/") == artifacts_of_killed_run
    assert store().find(prepared.sha256) == prepared
