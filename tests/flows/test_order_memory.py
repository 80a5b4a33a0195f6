"""An order that does not fit in memory is refused before any work, as a fault that may pass."""

import json
import subprocess
import sys

import pytest
from drafts import ALLOWED, environment, recpress, write_draft
from error_codes import Text, raises_code

from compressors.contracts import Limit
from flows.cli import errors as cli_errors
from flows.compress import compress
from flows.memory import describe_running_stage, estimated_memory, require_order_memory
from flows.order import Order
from infra.errors import InfraError, OutOfMemory
from infra.memory import memory_errors
from tasks.bundles.bundle_ref import find
from tasks.bundles.packing import pack


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECPRESS_HOME", str(folder / "recpress"))
        patch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
        write_draft(folder / "draft")
        pack(folder / "draft")
    return folder


@pytest.fixture(autouse=True)
def _in_home(home, monkeypatch):
    monkeypatch.setenv("RECPRESS_HOME", str(home / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)


def order() -> Order:
    return Order(model="clicks", preset="safe", limits=(Limit.parse("auc vs baseline >= -0.1"),))


def test_the_flow_refuses_an_order_that_does_not_fit_before_any_work(home, monkeypatch):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "300")
    before = sorted((home / "recpress").rglob("*"))
    with pytest.raises(OutOfMemory) as caught:
        compress.fn(order())
    sentence = str(caught.value)
    subject = find("clicks")
    needed = estimated_memory(order(), subject).peak - subject.weight_bytes
    for part in (f"use {needed // 2**20:,} MiB", "300 MiB are available", "RECPRESS_MEMORY_MB"):
        assert part in sentence, sentence
    assert sorted((home / "recpress").rglob("*")) == before
    assert isinstance(caught.value, InfraError), "exit code 1: with more memory it succeeds"


def test_an_order_that_fits_is_not_refused(monkeypatch):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "100000")
    assert require_order_memory(order(), find("clicks")).peak > 0


def test_what_ran_out_of_memory_names_stage_model_and_estimate():
    subject = find("clicks")
    doing = describe_running_stage(lambda: "measure", estimated_memory(order(), subject), subject)
    with (
        raises_code(
            OutOfMemory, None, doing=Text("^Stage 'measure' of the order for clicks@1, estimated")
        ),
        memory_errors(doing),
    ):
        raise MemoryError


def test_a_module_that_is_missing_is_not_called_out_of_memory(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flows.order_faults", None)
    assert cli_errors.report(ValueError("x")) == 1
    said = capsys.readouterr().err
    assert "a module that cannot be imported: " in said
    assert "flows.order_faults" in said
    assert "memory" not in said


@pytest.mark.parametrize("limit", [60, 400, 1000])
def test_a_process_with_too_little_address_space_ends_with_code_1_and_a_sentence(tmp_path, limit):
    check_under_limit(tmp_path, limit)


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(1500, 3500, 100))
def test_packing_under_any_limit_succeeds_or_ends_with_code_1_and_a_sentence(tmp_path, limit):
    check_under_limit(tmp_path, limit)


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(400, 3000, 200))
def test_packing_under_any_limit_of_data_succeeds_or_ends_with_code_1_and_a_sentence(
    tmp_path, limit
):
    check_under_limit(tmp_path, limit, kind="RLIMIT_DATA")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("limit", [1200, 1600, 2000, 2800, 4000])
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_an_order_under_any_limit_succeeds_or_ends_with_code_1_and_can_be_run_again(
    tmp_path, limit, kind
):
    env = environment(tmp_path)
    packed = recpress("bundle", "pack", str(write_draft(tmp_path / "draft")), env=env)
    assert packed.returncode == 0, packed.stderr
    ended = under_limit(
        env, kind, limit, "compress", "clicks", "--preset", "fast",
        "--limit", "auc vs baseline >= -0.1", "--promote",
    )  # fmt: skip
    assert ended.returncode in (0, 1), ended.stderr
    assert "Traceback" not in ended.stderr
    if ended.returncode == 1:
        assert "memory" in ended.stderr
        again = recpress("compress", "clicks", "--preset", "fast",
                         "--limit", "auc vs baseline >= -0.1", "--promote", env=env)  # fmt: skip
        assert again.returncode == 0, again.stderr
    listed = recpress("registry", "list", "--json", env=env)
    (version,) = json.loads(listed.stdout)
    assert (version["version"], version["aliases"][-1]) == ("1", "champion"), listed.stdout


LIMITED = """
import resource, sys
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]) * 2**20,) * 2)
sys.argv = ["recpress", *sys.argv[3:]]
from flows.cli.app import main
main()
"""


def under_limit(
    env: dict[str, str], kind: str, limit: int, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process with a limit in MiB."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(limit), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )


def check_under_limit(tmp_path, limit: int, kind: str = "RLIMIT_AS") -> None:
    draft = write_draft(tmp_path / "draft")
    ended = under_limit(environment(tmp_path), kind, limit, "bundle", "pack", str(draft))
    said = ended.stderr
    assert ended.returncode in (0, 1), said
    assert "Traceback" not in said
    if ended.returncode == 1:
        assert "memory" in said
        stored = list((tmp_path / "recpress/store").rglob("manifest.json"))
        assert not list((tmp_path / "recpress/store").rglob("bundles/*.json")), stored


EXHAUSTED = """
import resource, sys, threading
from infra import memory, memory_reserve
held = int(memory._held("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + 300 * 2**20,) * 2)
if sys.argv[1] == "with":
    memory_reserve.hold_reserve()
kept = []
def fill(block):
    while True:
        kept.append(bytearray(block))
try:
    with memory.memory_errors(lambda: "Filling"):
        for block in (2**20, 2**12, 64):
            try:
                fill(block)
            except MemoryError:
                pass
        fill(64)
except memory.OutOfMemory:
    thread = threading.Thread(target=print, args=("ran",))
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize("how", ["with", "without"])
def test_a_thread_can_start_after_memory_ran_out_only_because_some_was_held_back(how):
    """Prefect starts one to report a failure."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", EXHAUSTED, how],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        ran = ended.stdout == "ran\n"
    except subprocess.TimeoutExpired:
        ran = False  # the thread had no memory to say that it runs
    assert ran == (how == "with")
