"""No file and no output contains a secret after commands and flows that succeed or fail.

Each variable for a credential is set to a unique text (a canary). After a run, the tests search for
it in all files and all output.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from canaries import canaries, find_secrets
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
from tasks.orchestration.task_calls import NO_RESULTS, TASK_OPTIONS, call

SECRETS = canaries()
LIMIT = "auc vs baseline >= -0.2"


def address_with_secret(name: str, host: str) -> str:
    """Return an address whose password is the secret of a variable, percent-encoded."""
    return f"http://somebody:{SECRETS.in_address(name)}@{host}"


def variables_with_secrets(**more: str) -> dict[str, str]:
    """Return environment variables with secrets, except those whose value is an address.

    Args:
        more: further variables, which replace those of the same name.
    """
    secrets = {
        name: SECRETS.of(name)
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_TOKEN")
    }
    auth = f"admin:{SECRETS.of('PREFECT_API_AUTH_STRING')}"
    return {
        **secrets,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_API_KEY": SECRETS.of("PREFECT_API_KEY"),
        **more,
    }


@pytest.fixture
def prefect_folder(prefect_server: None) -> Iterator[Path]:
    """Return the folder of the test server's database; afterwards, assert that it has runs."""
    url = get_current_settings().server.database.connection_url
    assert url is not None
    file = Path(url.get_secret_value().partition("///")[2])
    yield file.parent
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM flow_run").fetchone() > (0,)
    database.close()


def assert_no_secret_in(folders: list[Path], texts: dict[str, str]) -> None:
    """Assert that no file in the folders and none of the texts contains a secret."""
    APILogHandler().flush()
    assert find_secrets(SECRETS, folders, texts) == []


# --- exceptions and one order ----------------------------------------------------------------


@task(**{**TASK_OPTIONS, "retries": 1, "retry_delay_seconds": 0})
def failing_task() -> int:
    """Raise an error with secrets in its message and cause; it is retried and logged twice."""
    token = SECRETS.in_address("AWS_SESSION_TOKEN")
    try:
        raise ConnectionError(
            f"{address_with_secret('MLFLOW_TRACKING_URI', 'h')}/api?token={token}"
        )
    except ConnectionError as fault:
        raise RegistryUnavailable(
            "registry_no_answer", problem=SECRETS.of("AWS_SECRET_ACCESS_KEY")
        ) from fault


@flow(name="failing-task", **NO_RESULTS)
@clean_exceptions()
def flow_with_failing_task() -> None:
    call(failing_task, "code")  # any text, which is a part of the task's cache key


@flow(name="failing-flow", **NO_RESULTS)
@clean_exceptions()
def failing_flow() -> None:
    raise ValueError(
        address_with_secret("MLFLOW_TRACKING_URI", "h"), {"key": SECRETS.of("AWS_SESSION_TOKEN")}
    )


def test_secrets_in_an_exception_are_not_stored_or_logged_by_prefect(
    work_folder: Path,
    prefect_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    for name, value in variables_with_secrets().items():
        if not name.startswith("PREFECT"):
            monkeypatch.setenv(name, value)
    with pytest.raises(RegistryUnavailable):
        flow_with_failing_task()
    with pytest.raises(ValueError, match="http"):
        failing_flow()
    APILogHandler().flush()
    assert_no_secret_in([work_folder, prefect_folder], dict(capture_texts(capfd)))


def capture_texts(capfd: pytest.CaptureFixture) -> Iterator[tuple[str, str]]:
    """Yield name and content of both outputs of this process."""
    captured = capfd.readouterr()
    yield "stdout", captured.out
    yield "stderr", captured.err


def test_order_with_an_unreachable_registry_does_not_store_or_print_its_password(
    accepted_order: AcceptedOrder,
    prefect_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = address_with_secret("MLFLOW_TRACKING_URI", "127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    order = accepted_order.order.model_copy(
        update={"limits": (Limit.parse("bytes vs baseline <= 0.6"),)}
    )
    with pytest.raises(RegistryUnavailable) as raised:
        run_in_prefect(order)
    code, out, err = run_main_apart(monkeypatch, capsys, "registry", "list")
    assert code == 1
    assert "registry did not respond" in err
    texts = {"raised": str(raised.value), "out": out, "err": err}
    assert_no_secret_in([accepted_order.home, prefect_folder], texts)


# --- many commands ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_commands_that_succeed_or_fail_do_not_store_or_print_a_secret(
    tmp_path: Path, s3_server: S3Server
) -> None:
    home = tmp_path / "home"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    base = environment(home, TMPDIR=str(temporary), **variables_with_secrets())
    draft = write_draft(tmp_path / "draft")
    texts: dict[str, str] = {}

    def run(name: str, *arguments: str, codes: tuple[int, ...], **more: str) -> str:
        """Run a command, store its output in ``texts``, and return its standard output.

        Args:
            name: key of the output in ``texts``.
            arguments: the arguments of ``recpress``.
            codes: the allowed exit codes.
            more: environment variables in addition to ``base``.
        """
        process = recpress(*arguments, env=base | more, seconds=400)
        texts[f"{name}: stdout"], texts[f"{name}: stderr"] = process.stdout, process.stderr
        assert process.returncode in codes, (name, process.returncode, process.stderr)
        return process.stdout

    order = ("compress", "clicks", "--preset", "safe")
    closed_registry = address_with_secret("MLFLOW_TRACKING_URI", "127.0.0.1:9")
    endpoint = address_with_secret("AWS_ENDPOINT_URL", s3_server.endpoint.partition("://")[2])
    closed_endpoint = address_with_secret("AWS_ENDPOINT_URL", "127.0.0.1:9")
    postgres = "postgresql://somebody:{}@127.0.0.1:9/m"
    database = postgres.format(SECRETS.in_address("MLFLOW_TRACKING_URI"))

    run("pack", "bundle", "pack", str(draft), codes=(0,))
    accepted = run("accepted", *order, "--limit", LIMIT, "--json", codes=(0,))
    assert Finished.model_validate_json(accepted).report.outcome == "accepted"
    run("repeated, with promotion", *order, "--limit", LIMIT, "--promote", codes=(0,))
    run("explain", "explain", "clicks", "--limit", LIMIT, codes=(0,))
    run("list", "registry", "list", codes=(0,))
    run("show", "registry", "show", "clicks", "--version", "1", codes=(0,))
    run("doctor", "doctor", codes=(0, 1))
    new_limit = "auc vs baseline >= -0.21"  # an order that no command has completed yet
    for debug in ({}, {"RECPRESS_DEBUG": "1"}):
        run(
            "registry down",
            *order,
            *("--limit", new_limit),
            codes=(1,),
            MLFLOW_TRACKING_URI=closed_registry,
            **debug,
        )
        variables = {
            "RECPRESS_STORE": "s3://models/canaries",
            "AWS_ENDPOINT_URL": endpoint,
            **debug,
        }
        run("wrong S3 key", *order, "--limit", LIMIT, codes=(1, 2), **variables)
        variables["AWS_ENDPOINT_URL"] = closed_endpoint
        run("S3 down", *order, "--limit", LIMIT, codes=(1, 2), **variables)
        variables_of_doctor = variables | {"MLFLOW_TRACKING_URI": closed_registry}
        run("S3 down, doctor", "doctor", codes=(1,), **variables_of_doctor)
        for name in ("RECPRESS_STORE", "RECPRESS_TRITON"):
            for form in ("s3://me:{}@bucket/x", "http://me:{}@h/x?token={}", "s3:/me:{}@b"):
                root = {name: form.format(*[SECRETS.in_address(name)] * 2), **debug}
                run(f"{name} {form}", "doctor", codes=(0, 1, 2), **root)
                run(f"{name} {form}, triton", "triton", "export", "clicks", codes=(1, 2), **root)
        invalid = "http://me:" + SECRETS.in_address("MLFLOW_TRACKING_URI") + "@[::1"
        for uri in (invalid, "ftp" + closed_registry, closed_registry.replace("9", "99999")):
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
    run("damaged registry", *order, "--limit", new_limit, codes=(1, 2))
    run("damaged registry, list", "registry", "list", codes=(1, 2))
    damaged.unlink()
    run("postgres down", "doctor", codes=(1,), MLFLOW_TRACKING_URI=database)
    assert_no_secret_in([tmp_path], texts)
