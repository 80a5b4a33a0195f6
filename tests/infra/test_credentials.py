"""Removal of credentials from messages, addresses, exceptions and log records.

``SECRETS`` are canaries: made-up values of variables such as passwords. No output may contain one.
A bare address of a server has no login, and a bare URI of a database has no password.
"""

import logging
import os
import traceback
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from canaries import Canaries, canaries, find_secrets
from error_codes import raises_code
from sqlalchemy import create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from infra.credentials import (
    clean_exceptions,
    clean_log_records,
    mask_credentials,
    move_registry_login,
    pass_to_driver,
    remove_database_secrets,
    remove_login,
)
from infra.errors import InfraError, Refused, RegistryRefused, RegistryUnavailable, SettingRefused
from infra.registry.mlflow_registry import Registry
from infra.services.setup import create_buckets
from infra.settings import load_settings, public_uri
from infra.store.object_store import Store

SECRETS = canaries()
SECRET = SECRETS.of("MLFLOW_TRACKING_URI")
ENCODED = SECRETS.in_address("MLFLOW_TRACKING_URI")  # percent-encoded


def format_exception_as_text(fault: BaseException) -> str:
    """Return all text of an exception that a program may print or store."""
    return "".join(traceback.format_exception(fault)) + repr(fault) + repr(fault.args)


def assert_no_secret(*texts: str, planted: Canaries = SECRETS) -> None:
    """Check that the texts contain none of the planted secrets."""
    texts_by_name = {str(number): text for number, text in enumerate(texts)}
    assert find_secrets(planted, folders=[], texts=texts_by_name) == []


# --- Text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("at http://me:pass@host:5000/x", "at http://***@host:5000/x"),
        ("at http://me:pa/ss@host/x", "at http://***@host/x"),
        ("at https://token@host", "at https://***@host"),
        (
            "HTTPConnectionPool: /api?a=1&token=abc&b=2",
            "HTTPConnectionPool: /api?a=1&token=***&b=2",
        ),
        (
            "https://b.s3/k?X-Amz-Signature=ab&X-Amz-Security-Token=c",
            "https://b.s3/k?X-Amz-Signature=***&X-Amz-Security-Token=***",
        ),
        ("file:///data/me@work/store is full", "file:///data/me@work/store is full"),
        ("registry:ctr@champion", "registry:ctr@champion"),
        ("write to a@b.example", "write to a@b.example"),
    ],
)
def test_mask_credentials_hides_logins_and_tokens_in_addresses_and_no_other_text(
    text: str, safe: str
) -> None:
    assert mask_credentials(text) == safe


def test_mask_credentials_hides_values_of_secret_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, secret in SECRETS.values.items():
        is_address = "URI" in name or "URL" in name
        monkeypatch.setenv(name, f"http://me:{secret}@host/x" if is_address else secret)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:" + SECRETS.of("PREFECT_API_AUTH_STRING"))
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI", "PREFECT_API_AUTH_STRING"):
        secret = SECRETS.of(name)
        assert_no_secret(
            mask_credentials(f"password {secret} refused"), mask_credentials(f"{[secret]}")
        )
        assert_no_secret(mask_credentials(f"http://me:{SECRETS.in_address(name)}@host"))


@pytest.mark.parametrize(
    "encoded",
    [lambda text: quote(text, safe=""), quote, quote_plus, lambda text: repr(text)[1:-1]],
    ids=["percent", "percent except /", "form", "repr"],
)
def test_mask_credentials_hides_encoded_values_of_secret_variables(
    encoded: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "pä ss/wo\\rd&1"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert mask_credentials(f"signed with {encoded(secret)} by x") == "signed with *** by x"


def test_mask_credentials_keeps_short_values_and_values_of_other_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "admin")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "enabled")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/etc/aws/credentials")
    text = "admin enabled /etc/aws/credentials"
    assert mask_credentials(text) == text


@pytest.mark.parametrize("uri", ["https:/me:secret@h/x", "me:secret@h:5000", "s3:me:secret@b"])
def test_public_uri_omits_the_password_of_an_address_with_a_missing_slash(uri: str) -> None:
    assert "secret" not in public_uri(uri)


# --- Addresses -------------------------------------------------------------------------------


def test_load_settings_moves_the_login_of_a_registry_to_mlflows_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    password = SECRETS.of("MLFLOW_TRACKING_URI")
    uri = f"http://some%40body:{SECRETS.in_address('MLFLOW_TRACKING_URI')}@127.0.0.1:9/base"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert load_settings().registry_uri == "http://127.0.0.1:9/base"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:9/base"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "some@body"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == password
    move_registry_login()  # a second call changes nothing
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == password


def test_mlflow_uses_the_moved_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pass%2Fword@127.0.0.1:9")
    load_settings()
    from mlflow.utils.credentials import get_default_host_creds

    credentials = get_default_host_creds("http://127.0.0.1:9")
    assert (credentials.username, credentials.password) == ("me", "pass/word")


@pytest.mark.parametrize(
    ("uri", "bare", "options"),
    [
        ("postgresql://me:pa%2Fss@db:5/m", "postgresql://me@db:5/m", {"password": "pa/ss"}),
        (
            "postgresql://me@db/m?password=x&sslmode=require",
            "postgresql://me@db/m?sslmode=require",
            {"password": "x"},
        ),
        ("mysql+pymysql://me@db/m?passwd=x", "mysql+pymysql://me@db/m", {"passwd": "x"}),
        ("postgresql://me@db/m", "postgresql://me@db/m", {}),
    ],
)
def test_remove_database_secrets_separates_passwords_from_the_uri(
    uri: str, bare: str, options: dict[str, str]
) -> None:
    assert remove_database_secrets(uri) == (bare, options)


def test_error_for_an_invalid_database_uri_does_not_quote_it() -> None:
    with pytest.raises(ValueError, match="not a database URI") as raised:
        remove_database_secrets(f"postgresql://me:{ENCODED}@db:port/m")
    assert_no_secret(format_exception_as_text(raised.value))


def test_pass_to_driver_adds_the_password_only_for_its_uri(tmp_path) -> None:
    file, other = tmp_path / "a.db", tmp_path / "b.db"
    pass_to_driver(f"sqlite:///{file}", {"password": "secret"})
    parameters_seen: list[dict[str, object]] = []
    for path in (file, other):
        engine = create_engine(f"sqlite:///{path}")

        @event.listens_for(engine, "do_connect")
        def connect(_: object, __: object, ___: object, parameters: dict[str, object]) -> None:
            parameters_seen.append(dict(parameters))
            parameters.pop("password", None)  # SQLite's driver has no argument ``password``

        with engine.connect():
            pass
        engine.dispose()
        assert "secret" not in repr(engine)
    assert [item.get("password") for item in parameters_seen] == ["secret", None]


def test_remove_login_decodes_the_login_and_keeps_the_rest_of_the_address() -> None:
    assert remove_login("https://a%3Ab:c@h:1/p?q=1") == ("https://h:1/p?q=1", "a:b", "c")
    assert remove_login("https://token@h") == ("https://h", "token", None)
    assert remove_login("https://h/x@y") == ("https://h/x@y", None, None)


# --- Exceptions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        # No server listens on port 9.
        f"http://somebody:{ENCODED}@127.0.0.1:9",
        f"http://{ENCODED}@127.0.0.1:9",
        f"http://somebody:{ENCODED}@no-such-host.invalid",
        f"http://somebody:{ENCODED}@127.0.0.1:99999",  # the largest port is 65535
        f"http://somebody:{ENCODED}@[::1",  # no closing bracket
        f"https://127.0.0.1:9/?token={ENCODED}",
        f"postgresql://somebody:{ENCODED}@127.0.0.1:9/mlflow",
        f"postgresql://somebody@127.0.0.1:9/mlflow?password={ENCODED}",
        f"postgresql://somebody:{ENCODED}@127.0.0.1:port/mlflow",  # the port is no number
        f"mysql+pymysql://somebody:{ENCODED}@127.0.0.1:9/mlflow",
        f"mysql+nosuchdriver://somebody:{ENCODED}@127.0.0.1:9/mlflow",
        f"mssql+pyodbc:///?odbc_connect=PWD%3D{ENCODED}",
        f"ftp://somebody:{ENCODED}@127.0.0.1:9",  # MLflow has no store for ftp
        f"http:/somebody:{ENCODED}@127.0.0.1:9",  # one slash is missing
    ],
)
def test_errors_of_the_registry_do_not_contain_the_credential_of_its_uri(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # 100 s otherwise
    with pytest.raises((InfraError, Refused)) as raised:
        Registry(load_settings().registry_uri).models()
    assert_no_secret(format_exception_as_text(raised.value), caplog.text)
    assert raised.value.__cause__ is None


def test_errors_of_an_s3_store_do_not_contain_a_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://me:{SECRETS.in_address('AWS_ENDPOINT_URL')}@127.0.0.1:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRETS.of(name))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for work in (lambda: Store("s3://models/x").keys(""), lambda: create_buckets(("models",))):
        with pytest.raises((InfraError, Refused)) as raised:
            work()
        assert_no_secret(format_exception_as_text(raised.value))


@pytest.mark.parametrize("name", ["RECPRESS_STORE", "RECPRESS_TRITON"])
@pytest.mark.parametrize(
    "form", ["s3://me:{}@bucket/x", "http://me:{}@h", "s3:/me:{}@b", "me:{}@h:1"]
)
def test_error_for_an_invalid_root_does_not_contain_its_credential(name: str, form: str) -> None:
    """A root is the address of an object store or of a Triton repository."""
    for secret in (SECRETS.of(name), SECRETS.in_address(name)):
        root = form.format(secret)
        try:
            uri = Store(root, name).root
        except SettingRefused as fault:
            assert_no_secret(format_exception_as_text(fault))
        else:
            assert uri.startswith("file://")  # the root is a valid name of a folder


def test_error_for_an_invalid_setting_does_not_contain_its_credential(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECPRESS_DEVICE", f"http://me:{ENCODED}@host")
    with raises_code(SettingRefused, "variable_invalid", name="RECPRESS_DEVICE") as raised:
        load_settings()
    assert_no_secret(format_exception_as_text(raised.value))


class LibraryError(Exception):
    """An exception like those of some libraries: its text does not depend on ``args``."""

    def __init__(self, uri: str) -> None:
        super().__init__("ignored")
        self.uri = uri

    def __str__(self) -> str:
        return f"cannot connect to {self.uri}"


def registry_unavailable(text: str) -> RegistryUnavailable:
    return RegistryUnavailable("registry_no_answer", problem=text)


def registry_refused(text: str) -> RegistryRefused:
    return RegistryRefused("registry_refused", problem=text)


@pytest.mark.parametrize(
    ("create", "kind"),
    [
        (ValueError, ValueError),
        (OSError, OSError),
        (registry_unavailable, RegistryUnavailable),
        (registry_refused, RegistryRefused),
        (LibraryError, LibraryError),
    ],
)
def test_clean_exceptions_removes_secrets_and_keeps_the_class(
    create: Callable[[str], Exception], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS.of("AWS_SECRET_ACCESS_KEY"))
    text = f"http://me:{ENCODED}@host and {SECRETS.of('AWS_SECRET_ACCESS_KEY')}"

    @clean_exceptions()
    def work() -> None:
        try:
            raise ConnectionError(text)
        except ConnectionError as fault:
            raise create(text) from fault

    with pytest.raises(kind) as raised:
        work()
    assert_no_secret(format_exception_as_text(raised.value))
    assert "host" in str(raised.value)


def test_clean_exceptions_keeps_a_cause_without_secrets() -> None:
    cause = SQLAlchemyError("no such table")
    with pytest.raises(ValueError, match="what") as raised, clean_exceptions():
        raise ValueError("what") from cause
    assert raised.value.__cause__ is cause


# --- Log records -----------------------------------------------------------------------------


def test_clean_log_records_removes_credentials_from_messages_and_tracebacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRETS.of("MLFLOW_TRACKING_TOKEN"))
    clean_log_records()
    log = logging.getLogger("some.library")
    try:
        raise ConnectionError(f"http://me:{ENCODED}@host", SECRETS.of("MLFLOW_TRACKING_TOKEN"))
    except ConnectionError:
        log.exception("could not reach %s", f"http://me:{ENCODED}@host")
    log.warning("%d%% of %s", 5, {"token": SECRETS.of("MLFLOW_TRACKING_TOKEN")})
    assert "ConnectionError" in caplog.text
    assert "5% of" in caplog.text
    assert_no_secret(caplog.text)
    assert "could not reach http://***@host" in caplog.text
