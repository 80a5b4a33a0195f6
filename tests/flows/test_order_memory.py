"""Orders and commands without enough memory: early errors, exit codes and messages.

Parameters named ``limit`` are resource limits of a child process, in MiB. The lowest ones are
exceeded while modules are imported; with higher ones the command may succeed. A home is the folder
with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder of a bundle before
it is packed.
"""

import json
import subprocess
import sys

import pytest
from drafts import ALLOWED, environment, recpress, write_draft
from error_codes import TextMatching, raises_code

from compressors.contracts import Limit
from flows.cli import errors as cli_errors
from flows.compress import compress
from flows.memory import describe_running_phase, estimate_memory, require_order_memory
from flows.order import Order
from infra.errors import InfraError, OutOfMemory
from infra.memory import memory_errors
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.packing import pack


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory):
    """A folder with a draft and a home in which it is packed."""
    folder = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECPRESS_HOME", str(folder / "recpress"))
        patch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
        write_draft(folder / "draft")
        pack(folder / "draft")
    return folder


@pytest.fixture(autouse=True)
def _use_home(work_folder, monkeypatch):
    monkeypatch.setenv("RECPRESS_HOME", str(work_folder / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)


def safe_order() -> Order:
    """Return an order with preset ``safe``."""
    return Order(model="clicks", preset="safe", limits=(Limit.parse("auc vs baseline >= -0.1"),))


def test_flow_raises_out_of_memory_before_any_work_if_an_order_does_not_fit(
    work_folder, monkeypatch
):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "300")
    before = sorted((work_folder / "recpress").rglob("*"))
    with pytest.raises(OutOfMemory) as caught:
        compress.fn(safe_order())
    sentence = str(caught.value)
    bundle = find_bundle("clicks")
    # The weights do not count: they are a memory-mapped file, whose pages can be freed.
    needed = estimate_memory(safe_order(), bundle).peak - bundle.weight_bytes
    for part in (f"use {needed // 2**20:,} MiB", "300 MiB are available", "RECPRESS_MEMORY_MB"):
        assert part in sentence, sentence
    assert sorted((work_folder / "recpress").rglob("*")) == before
    assert isinstance(caught.value, InfraError), "exit code 1, for a retry"


def test_order_that_fits_in_memory_is_not_refused(monkeypatch):
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "100000")
    assert require_order_memory(safe_order(), find_bundle("clicks")).peak > 0


def test_out_of_memory_error_names_phase_model_and_estimate():
    bundle = find_bundle("clicks")
    memory = estimate_memory(safe_order(), bundle)
    description = describe_running_phase(lambda: "measure", memory, bundle)
    with (
        raises_code(
            OutOfMemory,
            None,  # any code
            doing=TextMatching("^Phase 'measure' of the order for clicks@1, estimated"),
        ),
        memory_errors(description),
    ):
        raise MemoryError


def test_missing_module_is_not_reported_as_out_of_memory(monkeypatch, capsys):
    """``report_error`` imports the module. With a memory limit, a failed import means no memory."""
    monkeypatch.setitem(sys.modules, "flows.order_faults", None)
    assert cli_errors.report_error(ValueError("x")) == 1
    output = capsys.readouterr().err
    assert "a module that cannot be imported: " in output
    assert "flows.order_faults" in output
    assert "memory" not in output


@pytest.mark.parametrize("limit", [60, 400, 1000])
def test_pack_with_too_little_address_space_exits_with_code_1_and_a_sentence(tmp_path, limit):
    check_pack_under_limit(tmp_path, limit)


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(1500, 3500, 100))
def test_pack_with_any_address_space_succeeds_or_exits_with_code_1_and_a_sentence(tmp_path, limit):
    check_pack_under_limit(tmp_path, limit)


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(400, 3000, 200))
def test_pack_with_any_data_limit_succeeds_or_exits_with_code_1_and_a_sentence(tmp_path, limit):
    check_pack_under_limit(tmp_path, limit, kind="RLIMIT_DATA")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("limit", [1200, 1600, 2000, 2800, 4000])
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_order_with_any_memory_limit_succeeds_or_exits_with_code_1_and_can_run_again(
    tmp_path, limit, kind
):
    env = environment(tmp_path)
    packed = recpress("bundle", "pack", str(write_draft(tmp_path / "draft")), env=env)
    assert packed.returncode == 0, packed.stderr
    process = run_under_limit(
        env, kind, limit, "compress", "clicks", "--preset", "fast",
        "--limit", "auc vs baseline >= -0.1", "--promote",
    )  # fmt: skip
    assert process.returncode in (0, 1), process.stderr
    assert "Traceback" not in process.stderr
    if process.returncode == 1:
        assert "memory" in process.stderr
        options = ("--preset", "fast", "--limit", "auc vs baseline >= -0.1", "--promote")
        unlimited = recpress("compress", "clicks", *options, env=env)
        assert unlimited.returncode == 0, unlimited.stderr
    listed = recpress("registry", "list", "--json", env=env)
    (version,) = json.loads(listed.stdout)
    assert (version["version"], version["aliases"][-1]) == ("1", "champion"), listed.stdout


# Arguments: the limited resource, the limit in MiB, and the arguments of recpress.
LIMITED_COMMAND = """
import resource, sys
resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]) * 2**20,) * 2)
sys.argv = ["recpress", *sys.argv[3:]]
from flows.cli.app import main
main()
"""


def run_under_limit(
    env: dict[str, str], kind: str, limit: int, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of recpress in a process with a resource limit.

    Args:
        env: environment variables of the process.
        kind: the limited resource, a name of the module ``resource``.
        limit: the limit in MiB.
        arguments: the arguments of the command.
    """
    return subprocess.run(
        [sys.executable, "-c", LIMITED_COMMAND, kind, str(limit), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )


def check_pack_under_limit(tmp_path, limit: int, kind: str = "RLIMIT_AS") -> None:
    """Assert that pack succeeds under a limit, or exits with code 1 and stores no bundle.

    Args:
        tmp_path: the fixture.
        limit: the limit in MiB.
        kind: the limited resource: the address space, or with ``RLIMIT_DATA`` the data segment.
    """
    draft = write_draft(tmp_path / "draft")
    process = run_under_limit(environment(tmp_path), kind, limit, "bundle", "pack", str(draft))
    output = process.stderr
    assert process.returncode in (0, 1), output
    assert "Traceback" not in output
    if process.returncode == 1:
        assert "memory" in output
        stored = list((tmp_path / "recpress/store").rglob("manifest.json"))
        assert not list((tmp_path / "recpress/store").rglob("bundles/*.json")), stored


# Allocates blocks of 1 MiB, 4 kB and 64 bytes until no memory is left, as a task might, and then
# starts a thread. With the argument "with", recpress's reserve of memory is held from the start and
# released by ``memory_errors`` when memory runs out.
EXHAUST_MEMORY = """
import resource, sys, threading
from infra import memory, memory_reserve
used = int(memory.read_status_bytes("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20,) * 2)
if sys.argv[1] == "with":
    memory_reserve.hold_reserve()
blocks = []
def fill(block):
    while True:
        blocks.append(bytearray(block))
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


@pytest.mark.parametrize("reserve", ["with", "without"])
def test_thread_starts_after_memory_ran_out_only_with_a_reserve(reserve):
    """Prefect starts a thread to report a failure."""
    try:
        process = subprocess.run(
            [sys.executable, "-c", EXHAUST_MEMORY, reserve],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        has_started = process.stdout == "ran\n"
    except subprocess.TimeoutExpired:
        has_started = False  # the thread had no memory to print
    assert has_started == (reserve == "with")
