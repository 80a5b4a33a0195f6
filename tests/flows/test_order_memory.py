"""An order that does not fit in memory is refused before any work, as a fault that may pass."""

import subprocess
import sys

import pytest
from drafts import ALLOWED, environment, write_draft

from compressors.contracts import Limit
from flows.compress import compress
from flows.memory import estimated_memory, require_order_memory, what_ran
from flows.order import Order
from infra.errors import InfraError, OutOfMemory
from infra.memory import memory_errors
from tasks.bundles import pack
from tasks.subject import find


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
    doing = what_ran(lambda: "measure", estimated_memory(order(), subject), subject)
    words = r"Stage 'measure' of the order for clicks@1, estimated"
    with pytest.raises(OutOfMemory, match=words), memory_errors(doing):
        raise MemoryError


@pytest.mark.parametrize("limit", [60, 400, 1000])
def test_a_process_with_too_little_address_space_ends_with_code_1_and_a_sentence(tmp_path, limit):
    check_under_limit(tmp_path, limit)


@pytest.mark.slow
@pytest.mark.parametrize("limit", range(1500, 3500, 100))
def test_packing_under_any_limit_succeeds_or_ends_with_code_1_and_a_sentence(tmp_path, limit):
    check_under_limit(tmp_path, limit)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]) * 2**20,) * 2)
sys.argv = ["recpress", "bundle", "pack", sys.argv[2]]
from flows.cli import main
main()
"""


def check_under_limit(tmp_path, limit: int) -> None:
    write_draft(tmp_path / "draft")
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), str(tmp_path / "draft")],
        capture_output=True,
        text=True,
        check=False,
        env=environment(tmp_path),
    )
    said = ended.stderr
    assert ended.returncode in (0, 1), said
    assert "Traceback" not in said
    if ended.returncode == 1:
        assert "memory" in said
        stored = list((tmp_path / "recpress/store").rglob("manifest.json"))
        assert not list((tmp_path / "recpress/store").rglob("bundles/*.json")), stored
