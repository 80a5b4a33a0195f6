"""Files that pose as results of tasks, wherever results are or were: no content of theirs runs."""

import base64
import json
import lzma
import os
import pickle  # noqa: TID251 (an attack has to be made before it can be refused)
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drafts import write_draft
from error_codes import raises_code
from orders import PATIENCE, has_ended, use_home
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
from tasks.orchestration.policy import NO_RESULTS, call, content_key
from tasks.orchestration.result_records import record_key
from tasks.orchestration.workspace import store
from tasks.prepare import prepare

LIMITS = (Limit.parse("bytes vs baseline <= 1"),)
MODULE = "planted_module"

HOSTILE_SETTINGS: dict[str, Any] = {
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": True,
    "PREFECT_TASKS_DEFAULT_PERSIST_RESULT": True,
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "pickle",
    "PREFECT_TASKS_REFRESH_CACHE": False,
}


@flow(name="two-tasks", **NO_RESULTS)
def two_tasks(bundle: Artifact, code: str) -> tuple[Artifact, Verdict]:
    """One task with an artifact, one with a value, as ``compress`` calls them."""
    prepared = call(prepare, code, bundle=bundle, split="validation")
    return prepared, call(gate, code, target="onnxruntime", limits=LIMITS, measurement=None)


def task_runs() -> list[tuple[str, str]]:
    """Task and state of every task run of the newest flow run.

    The server receives the end of a task run as an event, which may come after the flow's own.
    """
    late = time.monotonic() + PATIENCE
    while True:
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(limit=200)
        newest = max(found, key=lambda run: run.created or 0)
        runs = [run for run in found if run.flow_run_id == newest.flow_run_id]
        if all(has_ended(run) for run in runs) or time.monotonic() > late:
            return sorted((run.name.split("-")[0], run.state_name or "") for run in runs)
        time.sleep(0.2)


# --- what is planted -------------------------------------------------------------------------


class Touch:
    """Creates a folder when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


def prefect_record(kind: str, trap: Path) -> bytes:
    """A record as Prefect writes it, whose decoding creates ``trap``."""
    pickled = pickle.dumps(Touch(trap))
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


def records(keys: dict[str, str], trap: Path) -> dict[str, dict[str, bytes]]:
    """Bodies for our own records, by what they are; each with the right names and a right seal."""
    pickled = base64.encodebytes(pickle.dumps(Touch(trap))).decode()

    def sealed(task: str, value: Any, **more: Any) -> bytes:
        fields = {"schema_version": 1, "task": task, "key": keys[task], "value": value}
        return seal_record({**fields, **more})

    decoder = {"__class__": f"{MODULE}.Thing", "data": {}}
    return {
        "raw pickle": {task: pickle.dumps(Touch(trap)) for task in keys},
        "pickle as text": {task: sealed(task, pickled) for task in keys},
        "class to import": {task: sealed(task, decoder) for task in keys},
        "exception to import": {
            task: sealed(task, {"__exc_type__": f"{MODULE}.Thing", "message": "x"}) for task in keys
        },
        "serializer named next to a sound value": {
            task: sealed(task, decoder, metadata={"serializer": {"type": "pickle"}})
            for task in keys
        },
        "record of Prefect": {task: prefect_record("pickle", trap) for task in keys},
    }


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A path that exists if anything planted was executed or imported."""
    place = tmp_path / "executed"
    (tmp_path / "modules").mkdir()
    body = f"import os\nos.mkdir({str(place)!r})\nclass Thing(Exception): ...\n"
    (tmp_path / "modules" / f"{MODULE}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield place
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A home with a bundle; tests use other ``code``, so they share no result."""
    home = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home)
        rows = dict.fromkeys(("train", "calibration", "validation", "test"), 200)
        return home, pack(write_draft(home / "draft", rows=rows)).artifact


@pytest.fixture
def bundle(
    packed: tuple[Path, Artifact], prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> Artifact:
    use_home(monkeypatch, packed[0])
    return packed[1]


@pytest.fixture
def code() -> str:
    """Part of every key, so each test has results of its own."""
    return f"code {time.time_ns()}"


def keys_of(bundle: Artifact, code: str) -> dict[str, str]:
    return {
        "prepare": content_key(prepare, code, {"bundle": bundle, "split": "validation"}),
        "gate": content_key(
            gate, code, {"target": "onnxruntime", "limits": LIMITS, "measurement": None}
        ),
    }


# --- Prefect's own records -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "hostile"),
    [("pickle", False), ("pickle", True), ("compressed/pickle", True), ("json class", True)],
    ids=lambda item: {False: "default settings", True: "persist by default"}.get(item, item),
)
def test_planted_results_of_prefect_are_not_read(
    bundle: Artifact,
    code: str,
    trap: Path,
    tmp_path: Path,
    kind: str,
    hostile: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = two_tasks(bundle, code)
    for task, key in keys_of(bundle, code).items():
        record = store().root.removeprefix("file://") + "/" + record_key(task, key)
        Path(record).unlink()  # the flow looks for the result elsewhere, if anywhere
    places = [
        load_settings().home / "results",
        get_current_settings().results.local_storage_path,
        tmp_path / "block",
    ]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for task, key in keys_of(bundle, code).items():
            for name in (f"{task}-{key}", key, record_key(task, key)):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(prefect_record(kind, trap))
    updates: dict[str, Any] = {}
    if hostile:
        LocalFileSystem(basepath=str(tmp_path / "block")).save("planted", overwrite=True)
        block = "local-file-system/planted"
        monkeypatch.setenv("PREFECT_DEFAULT_RESULT_STORAGE_BLOCK", block)
        updates = {**HOSTILE_SETTINGS, "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": block}
    before = files_below(places)
    with temporary_settings(updates=settings_named(updates)):
        assert two_tasks(bundle, code) == expected
    assert not trap.exists()
    assert task_runs() == [("gate onnxruntime", "Completed"), ("prepare validation", "Completed")]
    assert files_below(places) == before, "Prefect stored a result"


def settings_named(updates: dict[str, Any]) -> dict[Any, Any]:
    import prefect.settings

    return {getattr(prefect.settings, name): value for name, value in updates.items()}


def files_below(places: list[Path]) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()
    }


class Killed(BaseException):
    """Nothing in between catches it, as nothing catches a kill."""


@flow(name="refusing", **NO_RESULTS)
def refusing() -> None:
    raise DataRefused("checks_missing")


def test_the_exception_of_a_failed_flow_is_not_stored_by_prefect(
    empty_home: Path, prefect_server: None
) -> None:
    storage = [get_current_settings().results.local_storage_path]
    before = files_below(storage)
    with raises_code(DataRefused, "checks_missing"):
        refusing()
    assert files_below(storage) == before


# --- our own records -------------------------------------------------------------------------


@pytest.mark.parametrize("what", list(records({"prepare": "0" * 64}, Path("x"))))
def test_a_planted_record_is_replaced_and_nothing_in_it_runs(
    bundle: Artifact, code: str, trap: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = two_tasks(bundle, code)
    keys = keys_of(bundle, code)
    folder = store().folder
    assert folder is not None
    sound = {task: (folder / record_key(task, key)).read_bytes() for task, key in keys.items()}
    for task, body in records(keys, trap)[what].items():
        store().write(record_key(task, keys[task]), body)
    with temporary_settings(updates=settings_named(HOSTILE_SETTINGS)):
        assert two_tasks(bundle, code) == expected
    assert not trap.exists()
    assert task_runs() == [("gate onnxruntime", "Completed"), ("prepare validation", "Completed")]
    assert "is damaged" in caplog.text
    for task, key in keys.items():
        assert (folder / record_key(task, key)).read_bytes() == sound[task]


def test_a_sound_record_is_used_and_shown_as_cached(bundle: Artifact, code: str) -> None:
    expected = two_tasks(bundle, code)
    assert two_tasks(bundle, code) == expected
    assert task_runs() == [("gate onnxruntime", "Cached"), ("prepare validation", "Cached")]


def test_a_task_that_ended_before_its_record_was_written_runs_again(
    bundle: Artifact, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("tasks.orchestration.policy.write_result", killed)
        with pytest.raises(Killed):
            two_tasks(bundle, code)
    assert keys_of(bundle, code)["prepare"] not in " ".join(store().keys("results/"))
    first = store().keys("artifacts/")
    prepared, _ = two_tasks(bundle, code)
    assert store().keys("artifacts/") == first  # the same bytes, so the same artifact
    assert store().find(prepared.sha256) == prepared
