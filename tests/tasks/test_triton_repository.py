"""Updates of a Triton repository: promotion, repair, killed processes, and S3.

``fill("ab", "a")`` publishes the orders "aaa..." and "bbb..." as versions 1 and 2, and promotes the
first (``conftest.py``). ``loaded_version`` returns the version that a server would load and
the bytes of its graph. The ledger is the list of a model's promotions and rollbacks in the store.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from error_codes import raises_code
from pairwise import parametrize_pairwise
from pbtxt_reader import parse_message
from reports import create_report, store_files
from triton_configs import loaded_version
from triton_versions import (
    Fill,
    champion_number,
    graph_bytes,
    promote_during_next_promotion,
    publish_version,
)

from infra.errors import AlreadyThere, StoreUnavailable, TritonRefused
from infra.registry.ledger import Ledger
from infra.registry.mlflow_registry import Registry
from infra.store.folder import Folder
from infra.store.object_store import Store
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import (
    export,
    promote,
    registry,
    repair,
    rollback,
    triton_contents,
    version_report,
)

# --- updates ---------------------------------------------------------------------------------


def test_promotion_and_rollback_update_the_triton_repository(
    work_folder: Path, fill: Fill, triton: Path
) -> None:
    one, two = fill("ab", "")
    assert not triton.exists()
    promote("m", one, reason="")
    assert loaded_version(triton) == (one, graph_bytes("a"))
    promote("m", two, reason="")
    assert loaded_version(triton) == (two, graph_bytes("b"))
    rollback("m", reason="clicks fell")
    assert loaded_version(triton) == (one, graph_bytes("a"))
    assert (triton / "m" / two / "model.onnx").read_bytes() == graph_bytes("b")
    assert sorted(path.name for path in triton.iterdir()) == ["m"]


def test_promotion_without_the_setting_writes_no_configuration(
    work_folder: Path, fill: Fill
) -> None:
    (one,) = fill("a", "")
    promote("m", one, reason="")
    assert list(work_folder.rglob("config.pbtxt")) == []


def test_repair_fills_a_repository_that_was_set_up_later(
    work_folder: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = fill("a", "")
    promote("m", one, reason="")
    monkeypatch.setenv("RECPRESS_TRITON", str(work_folder / "late"))
    repair("m")
    assert loaded_version(work_folder / "late") == (one, graph_bytes("a"))
    assert "the Triton repository was repaired from the ledger" in caplog.text
    caplog.clear()
    repair("m")
    assert caplog.text == ""


def test_changed_or_removed_file_is_replaced(work_folder: Path, fill: Fill, triton: Path) -> None:
    one, two = fill("ab", "ab")
    config = triton / "m" / "config.pbtxt"
    original = config.read_bytes()
    config.chmod(0o644)
    config.write_bytes(original.replace(f"[{two}]".encode(), f"[{one}]".encode()))
    version_report("m", "@champion")
    assert config.read_bytes() == original
    (triton / "m" / two / "model.onnx").unlink()
    promote("m", two, reason="again")
    assert loaded_version(triton) == (two, graph_bytes("b"))


def test_existing_file_with_other_bytes_of_the_same_size_is_replaced(
    work_folder: Path, fill: Fill, triton: Path
) -> None:
    (one,) = fill("a", "")
    existing = triton / "m" / one / "model.onnx"
    existing.parent.mkdir(parents=True)
    existing.write_bytes(graph_bytes("f"))  # as many bytes as the graph of order "aaa..."
    promote("m", one, reason="")
    assert loaded_version(triton) == (one, graph_bytes("a"))


def test_external_weights_of_a_graph_are_uploaded_before_the_graph(
    work_folder: Path, triton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = create_report(work_folder, "a" * 64, {"onnxruntime": "accepted"})
    artifact = store_files(work_folder / "large", model_onnx="graph", model_onnx_data="weights")
    target = accepted.targets[0].model_copy(update={"artifact": artifact})
    uploaded_keys = []
    upload = Folder.upload

    def log_and_upload(folder: Folder, key: str, *arguments: Any) -> None:
        uploaded_keys.append(key)
        upload(folder, key, *arguments)

    one = publish_version(work_folder, "a", targets=(target,)).version
    monkeypatch.setattr(Folder, "upload", log_and_upload)
    promote("m", one, reason="")
    assert uploaded_keys == [f"{one}/model.onnx.data", f"{one}/model.onnx"]


def test_refused_concurrent_promotion_does_not_change_the_served_version(
    work_folder: Path, fill: Fill, triton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = fill("ab", "")
    promote_during_next_promotion(one, monkeypatch)
    with raises_code(AlreadyThere, "ledger_moved_on", reason="concurrent"):
        promote("m", two, reason="refused")
    assert loaded_version(triton) == (one, graph_bytes("a"))


def test_promotion_serves_the_champion_of_a_later_concurrent_promotion(
    work_folder: Path, fill: Fill, triton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = fill("ab", "")
    write = Folder.write

    def promote_other_then_write(folder: Folder, key: str, body: bytes) -> None:
        """Promote another version just before a promotion writes Triton's configuration."""
        if key == "config.pbtxt":
            monkeypatch.setattr(Folder, "write", write)
            promote("m", two, reason="in between")
        write(folder, key, body)

    monkeypatch.setattr(Folder, "write", promote_other_then_write)
    promote("m", one, reason="")
    assert champion_number() == two
    assert loaded_version(triton) == (two, graph_bytes("b"))


# --- killed processes -----------------------------------------------------------------------


class ProcessKilled(Exception):
    """Raised where the process is assumed to be killed."""


def kill_at_write(
    monkeypatch: pytest.MonkeyPatch, number: int, *, is_written: bool
) -> Callable[[], int]:
    """Raise ``ProcessKilled`` at a write to a store or the registry.

    Args:
        monkeypatch: the fixture.
        number: number of the write, from 1.
        is_written: whether to raise after the write instead of before it.

    Returns:
        A function that returns the number of writes so far.
    """
    writes = 0

    def with_kill(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes > number or (writes == number and not is_written):
                raise ProcessKilled
            result = method(*arguments)
            if writes == number:
                raise ProcessKilled
            return result

        return write

    for owner, name in (
        (Folder, "write"),
        (Folder, "create"),
        (Folder, "upload"),
        (Registry, "set_alias"),
    ):
        monkeypatch.setattr(owner, name, with_kill(getattr(owner, name)))
    return lambda: writes


WRITES = 4  # of a promotion, in order: graph file, ledger entry, alias, Triton's configuration


@parametrize_pairwise(
    completed_by=["repeated promotion", "repair"],
    number=range(1, WRITES + 1),
    is_written={"before": False, "after": True},
)
def test_killed_promotion_leaves_a_complete_champion_and_is_completed_later(
    work_folder: Path, fill: Fill, triton: Path, number: int, is_written: bool, completed_by: str
) -> None:
    one, two = fill("ab", "a")
    complete = {(one, graph_bytes("a")), (two, graph_bytes("b"))}
    with pytest.MonkeyPatch.context() as patch:
        kill_at_write(patch, number, is_written=is_written)
        with pytest.raises(ProcessKilled):
            promote("m", two, reason="")
    served = loaded_version(triton)
    assert served in complete
    if served == (two, graph_bytes("b")):  # the configuration is written after the ledger entry
        assert champion_number() == two
    assert (triton / "m" / one / "model.onnx").read_bytes() == graph_bytes("a")
    if champion_number() == two:
        assert (triton / "m" / two / "model.onnx").read_bytes() == graph_bytes("b")
    if completed_by == "repeated promotion":
        promote("m", two, reason="")
    else:
        repair("m")
    graph_of = {one: graph_bytes("a"), two: graph_bytes("b")}
    assert loaded_version(triton) == (champion_number(), graph_of[champion_number()])
    # A repair only completes a promotion that is in the ledger.
    assert champion_number() == two or completed_by == "repair"
    (aliased,) = (item for item in registry().versions("m") if "champion" in item.aliases)
    assert aliased.version == champion_number()


@pytest.mark.parametrize(
    ("number", "is_written"),
    [
        # The default tier kills after writes 1 and 3, and before write 2.
        pytest.param(
            number,
            is_written,
            id=f"{number}-{'after' if is_written else 'before'}",
            marks=() if bool(number % 2) == is_written else pytest.mark.nightly,
        )
        for number in range(1, WRITES)
        for is_written in (False, True)
    ],
)
def test_killed_rollback_leaves_a_complete_champion_and_is_completed_later(
    work_folder: Path, fill: Fill, triton: Path, number: int, is_written: bool
) -> None:
    """A rollback has three writes, since the file of the earlier version exists."""
    one, two = fill("ab", "ab")
    with pytest.MonkeyPatch.context() as patch:
        kill_at_write(patch, number, is_written=is_written)
        with pytest.raises(ProcessKilled):
            rollback("m", reason="")
    served = loaded_version(triton)
    assert served in {(one, graph_bytes("a")), (two, graph_bytes("b"))}
    if champion_number() == two:
        assert served == (two, graph_bytes("b"))
        rollback("m", reason="once more")
    else:
        repair("m")
    assert champion_number() == one
    assert loaded_version(triton) == (one, graph_bytes("a"))


def test_promotion_has_four_writes(work_folder: Path, fill: Fill, triton: Path) -> None:
    (one,) = fill("a", "")
    with pytest.MonkeyPatch.context() as patch:
        count_writes = kill_at_write(patch, 99, is_written=False)  # more than WRITES: no kill
        promote("m", one, reason="")
    assert count_writes() == WRITES


def test_killed_first_promotion_serves_nothing_before_the_ledger_entry(
    work_folder: Path, fill: Fill, triton: Path
) -> None:
    (one,) = fill("a", "")
    for number in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            kill_at_write(patch, number, is_written=False)
            with pytest.raises(ProcessKilled):
                promote("m", one, reason="")
        assert loaded_version(triton) is None
        assert Ledger(store(), "m").champion() is None


def test_promotion_to_an_unreachable_repository_fails_before_the_ledger_entry(
    work_folder: Path, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = fill("a", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # no server uses this port
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("RECPRESS_TRITON", "s3://models/triton")
    with pytest.raises(StoreUnavailable):
        promote("m", one, reason="")
    assert Ledger(store(), "m").entries() == ()


def test_version_report_logs_a_failed_update_of_the_repository(
    work_folder: Path, fill: Fill, triton: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (one,) = fill("a", "a")
    config = triton / "m" / "config.pbtxt"
    config.chmod(0o644)
    config.write_text("not written by recpress")
    assert version_report("m", "@champion")[0].version == one
    assert "the Triton repository was not updated" in caplog.text
    with raises_code(TritonRefused, "configuration_foreign"):
        repair("m")
    assert config.read_text() == "not written by recpress"


# --- S3 -------------------------------------------------------------------------------------


def test_repository_in_a_bucket_is_updated_like_a_folder(
    work_folder: Path, fill: Fill, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"s3://models/triton-{time.time_ns()}"
    monkeypatch.setenv("RECPRESS_TRITON", root)
    one, two = fill("ab", "")
    promote("m", one, reason="")
    promote("m", two, reason="")
    bucket = Store(root)
    assert bucket.keys("") == ("m/1/model.onnx", "m/2/model.onnx", "m/config.pbtxt")
    assert bucket.read(f"m/{two}/model.onnx") == graph_bytes("b")
    text = bucket.read("m/config.pbtxt").decode()
    assert parse_message(text)["version_policy"] == [{"specific": [{"versions": [int(two)]}]}]
    bucket.write(f"m/{two}/model.onnx", graph_bytes("f"))
    (model,) = triton_contents("m", None)
    assert (model.state, model.files) == ("champion", {f"{two}/model.onnx": "changed"})
    (model,) = export("m", None)
    assert model.sound  # a server that starts now loads the champion, and its files are undamaged
    rollback("m", reason="")
    assert f"versions: [{one}]" in bucket.read("m/config.pbtxt").decode()
