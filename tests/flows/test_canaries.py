"""Secrets planted in every variable for a credential are nowhere after real runs, failed or not."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from canaries import canaries, traces
from command_line import run_main_apart
from drafts import environment, recpress, write_draft
from orders import AcceptedOrder, run_in_prefect
from prefect import flow, task
from prefect.logging.handlers import APILogHandler
from prefect.settings import get_current_settings
from s3_server import S3Server

from compressors.contracts import Limit
from infra.credentials import clean_exceptions
from infra.errors import RegistryUnavailable
from tasks.orchestration.documents import Finished
from tasks.orchestration.policy import KEPT, NO_RESULTS, call

PLANTED = canaries()
LIMIT = "auc vs baseline >= -0.2"


def login(name: str, host: str) -> str:
    """An address with the secret of a variable as its password."""
    return f"http://somebody:{PLANTED.in_address(name)}@{host}"


def everywhere(**more: str) -> dict[str, str]:
    """A secret in each variable that is not an address; ``more`` replaces some."""
    plain = {
        name: PLANTED.of(name)
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_TOKEN")
    }
    auth = f"admin:{PLANTED.of('PREFECT_API_AUTH_STRING')}"
    return {
        **plain,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_API_KEY": PLANTED.of("PREFECT_API_KEY"),
        **more,
    }


@pytest.fixture
def prefect_folder(prefect_server: None) -> Iterator[Path]:
    """Where the test server has its database."""
    url = get_current_settings().server.database.connection_url
    assert url is not None
    file = Path(url.get_secret_value().partition("///")[2])
    yield file.parent
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM flow_run").fetchone() > (0,)
    database.close()


def assert_nowhere(folders: list[Path], texts: dict[str, str]) -> None:
    APILogHandler().flush()
    assert traces(PLANTED, folders, texts) == []


# --- a sample --------------------------------------------------------------------------------


@task(**{**KEPT, "retries": 1, "retry_delay_seconds": 0})
def failing() -> int:
    """Fail as a library whose message repeats its configuration; retried, so logged twice."""
    token = PLANTED.in_address("AWS_SESSION_TOKEN")
    try:
        raise ConnectionError(f"{login('MLFLOW_TRACKING_URI', 'h')}/api?token={token}")
    except ConnectionError as fault:
        raise RegistryUnavailable(
            "registry_no_answer", problem=PLANTED.of("AWS_SECRET_ACCESS_KEY")
        ) from fault


@flow(name="failing-task", **NO_RESULTS)
@clean_exceptions()
def failing_task() -> None:
    call(failing, "code")


@flow(name="failing-flow", **NO_RESULTS)
@clean_exceptions()
def failing_flow() -> None:
    raise ValueError(login("MLFLOW_TRACKING_URI", "h"), {"key": PLANTED.of("AWS_SESSION_TOKEN")})


def test_an_exception_with_secrets_reaches_prefect_without_them(
    empty_home: Path,
    prefect_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    for name, value in everywhere().items():
        if not name.startswith("PREFECT"):
            monkeypatch.setenv(name, value)
    with pytest.raises(RegistryUnavailable):
        failing_task()
    with pytest.raises(ValueError, match="http"):
        failing_flow()
    APILogHandler().flush()
    assert_nowhere([empty_home, prefect_folder], dict(enumerate_texts(capfd)))


def enumerate_texts(capfd: pytest.CaptureFixture) -> Iterator[tuple[str, str]]:
    captured = capfd.readouterr()
    yield "stdout", captured.out
    yield "stderr", captured.err


def test_an_order_whose_registry_is_down_leaves_its_password_nowhere(
    accepted_order: AcceptedOrder,
    prefect_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = login("MLFLOW_TRACKING_URI", "127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    order = accepted_order.order.model_copy(
        update={"limits": (Limit.parse("bytes vs baseline <= 0.6"),)}
    )
    with pytest.raises(RegistryUnavailable) as raised:
        run_in_prefect(order)
    code, out, err = run_main_apart(monkeypatch, capsys, "registry", "list")
    assert code == 1
    assert "registry did not answer" in err
    texts = {"raised": str(raised.value), "out": out, "err": err}
    assert_nowhere([accepted_order.home, prefect_folder], texts)


# --- the tour --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_command_and_no_order_leaves_a_secret_anywhere(
    tmp_path: Path, s3_server: S3Server
) -> None:
    home = tmp_path / "home"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    base = environment(home, TMPDIR=str(temporary), **everywhere())
    draft = write_draft(tmp_path / "draft")
    texts: dict[str, str] = {}

    def run(name: str, *arguments: str, codes: tuple[int, ...], **more: str) -> str:
        ended = recpress(*arguments, env=base | more, seconds=400)
        texts[f"{name}: stdout"], texts[f"{name}: stderr"] = ended.stdout, ended.stderr
        assert ended.returncode in codes, (name, ended.returncode, ended.stderr)
        return ended.stdout

    order = ("compress", "clicks", "--preset", "safe")
    down = login("MLFLOW_TRACKING_URI", "127.0.0.1:9")
    endpoint = login("AWS_ENDPOINT_URL", s3_server.endpoint.partition("://")[2])
    silent = login("AWS_ENDPOINT_URL", "127.0.0.1:9")
    postgres = "postgresql://somebody:{}@127.0.0.1:9/m"
    database = postgres.format(PLANTED.in_address("MLFLOW_TRACKING_URI"))

    run("pack", "bundle", "pack", str(draft), codes=(0,))
    accepted = run("accepted", *order, "--limit", LIMIT, "--json", codes=(0,))
    assert Finished.model_validate_json(accepted).report.outcome == "accepted"
    run("again", *order, "--limit", LIMIT, "--promote", codes=(0,))
    run("explain", "explain", "clicks", "--limit", LIMIT, codes=(0,))
    run("list", "registry", "list", codes=(0,))
    run("show", "registry", "show", "clicks", "--version", "1", codes=(0,))
    run("doctor", "doctor", codes=(0, 1))
    other = "auc vs baseline >= -0.21"
    for debug in ({}, {"RECPRESS_DEBUG": "1"}):
        run(
            "registry down", *order, "--limit", other, codes=(1,), MLFLOW_TRACKING_URI=down, **debug
        )
        wrong = {"RECPRESS_STORE": "s3://models/canaries", "AWS_ENDPOINT_URL": endpoint, **debug}
        run("wrong S3 key", *order, "--limit", LIMIT, codes=(1, 2), **wrong)
        wrong["AWS_ENDPOINT_URL"] = silent
        run("S3 down", *order, "--limit", LIMIT, codes=(1, 2), **wrong)
        run("S3 down, doctor", "doctor", codes=(1,), MLFLOW_TRACKING_URI=down, **wrong)
        for name in ("RECPRESS_STORE", "RECPRESS_TRITON"):
            for form in ("s3://me:{}@bucket/x", "http://me:{}@h/x?token={}", "s3:/me:{}@b"):
                root = {name: form.format(*[PLANTED.in_address(name)] * 2), **debug}
                run(f"{name} {form}", "doctor", codes=(0, 1, 2), **root)
                run(f"{name} {form}, triton", "triton", "export", "clicks", codes=(1, 2), **root)
        invalid = "http://me:" + PLANTED.in_address("MLFLOW_TRACKING_URI") + "@[::1"
        for uri in (invalid, "ftp" + down, down.replace("9", "99999")):
            run(
                f"list {uri[:4]}",
                "registry",
                "list",
                codes=(1, 2),
                MLFLOW_TRACKING_URI=uri,
                **debug,
            )
    damaged = home / "recpress" / "registry.db"
    damaged.write_bytes(b"SQLite format 3\0" + b"\1" * 5_000)
    run("damaged registry", *order, "--limit", other, codes=(1, 2))
    run("damaged registry, list", "registry", "list", codes=(1, 2))
    damaged.unlink()
    run("postgres down", "doctor", codes=(1,), MLFLOW_TRACKING_URI=database)
    assert_nowhere([tmp_path], texts)
