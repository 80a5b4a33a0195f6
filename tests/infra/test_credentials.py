"""No message, log record or address of ours carries a credential."""

import logging
import os
import traceback
from collections.abc import Callable
from urllib.parse import quote, quote_plus

import pytest
from canaries import Canaries, canaries, traces
from error_codes import raises_code
from sqlalchemy import create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from infra.credentials import (
    bare_database,
    bare_login,
    clean_exceptions,
    clean_log_records,
    cleaned,
    move_registry_login,
    pass_to_driver,
)
from infra.errors import InfraError, Refused, RegistryRefused, RegistryUnavailable, SettingRefused
from infra.registry.mlflow_registry import Registry
from infra.services.setup import make_buckets
from infra.settings import load_settings, shown
from infra.store.object_store import Store

PLANTED = canaries()
SECRET = PLANTED.of("MLFLOW_TRACKING_URI")
ENCODED = PLANTED.in_address("MLFLOW_TRACKING_URI")


def chain(fault: BaseException) -> str:
    """All that a program may print or store of an exception, its hidden context left out."""
    return "".join(traceback.format_exception(fault)) + repr(fault) + repr(fault.args)


def assert_clean(*texts: str, planted: Canaries = PLANTED) -> None:
    assert traces(planted, [], {str(number): text for number, text in enumerate(texts)}) == []


# --- text ------------------------------------------------------------------------------------


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
        ("https://b.s3/k?X-Amz-Signature=ab&X-Amz-Security-Token=c", None),
        ("file:///data/me@work/store is full", "file:///data/me@work/store is full"),
        ("registry:ctr@champion", "registry:ctr@champion"),
        ("write to a@b.example", "write to a@b.example"),
    ],
)
def test_logins_and_tokens_in_addresses_are_hidden_and_other_text_stays(
    text: str, safe: str | None
) -> None:
    found = cleaned(text)
    assert found == (safe or "https://b.s3/k?X-Amz-Signature=***&X-Amz-Security-Token=***")


def test_values_of_secret_variables_are_hidden_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, secret in PLANTED.values.items():
        monkeypatch.setenv(name, secret if "UR" not in name else f"http://me:{secret}@host/x")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:" + PLANTED.of("PREFECT_API_AUTH_STRING"))
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI", "PREFECT_API_AUTH_STRING"):
        secret = PLANTED.of(name)
        assert_clean(cleaned(f"password {secret} refused"), cleaned(f"{[secret]}"))
        assert_clean(cleaned(f"http://me:{PLANTED.in_address(name)}@host"))


@pytest.mark.parametrize(
    "encoded",
    [lambda text: quote(text, safe=""), quote, quote_plus, lambda text: repr(text)[1:-1]],
    ids=["percent", "percent except /", "form", "repr"],
)
def test_encoded_values_of_secret_variables_are_hidden_outside_of_addresses(
    encoded: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "pä ss/wo\\rd&1"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert cleaned(f"signed with {encoded(secret)} by x") == "signed with *** by x"


def test_short_and_ordinary_values_of_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "admin")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "enabled")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/etc/aws/credentials")
    text = "admin enabled /etc/aws/credentials"
    assert cleaned(text) == text


@pytest.mark.parametrize("uri", ["https:/me:secret@h/x", "me:secret@h:5000", "s3:me:secret@b"])
def test_an_address_with_a_missing_slash_is_shown_without_its_password(uri: str) -> None:
    assert "secret" not in shown(uri)


# --- addresses -------------------------------------------------------------------------------


def test_the_login_of_a_registry_moves_to_the_variables_of_mlflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    password = PLANTED.of("MLFLOW_TRACKING_URI")
    uri = f"http://some%40body:{PLANTED.in_address('MLFLOW_TRACKING_URI')}@127.0.0.1:9/base"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert load_settings().registry_uri == "http://127.0.0.1:9/base"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:9/base"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "some@body"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == password
    move_registry_login()  # nothing is left to move
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == password


def test_mlflow_sends_the_login_that_was_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pass%2Fword@127.0.0.1:9")
    load_settings()
    from mlflow.utils.credentials import get_default_host_creds

    credentials = get_default_host_creds("http://127.0.0.1:9")
    assert (credentials.username, credentials.password) == ("me", "pass/word")


@pytest.mark.parametrize(
    ("uri", "bare", "options"),
    [
        ("postgresql://me:pa%2Fss@db:5/m", "postgresql://me@db:5/m", {"password": "pa/ss"}),
        ("postgresql://me@db/m?password=x&sslmode=require", None, {"password": "x"}),
        ("mysql+pymysql://me@db/m?passwd=x", "mysql+pymysql://me@db/m", {"passwd": "x"}),
        ("postgresql://me@db/m", "postgresql://me@db/m", {}),
    ],
)
def test_a_database_uri_is_passed_on_without_its_password(
    uri: str, bare: str | None, options: dict[str, str]
) -> None:
    assert bare_database(uri) == (bare or "postgresql://me@db/m?sslmode=require", options)


def test_a_database_uri_that_cannot_be_parsed_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="no database URI") as raised:
        bare_database(f"postgresql://me:{ENCODED}@db:port/m")
    assert_clean(chain(raised.value))


def test_the_driver_receives_the_password_and_only_on_its_own_engine(tmp_path) -> None:
    file, other = tmp_path / "a.db", tmp_path / "b.db"
    pass_to_driver(f"sqlite:///{file}", {"password": "secret"})
    seen: list[dict[str, object]] = []
    for path in (file, other):
        engine = create_engine(f"sqlite:///{path}")

        @event.listens_for(engine, "do_connect")
        def connect(_: object, __: object, ___: object, parameters: dict[str, object]) -> None:
            seen.append(dict(parameters))
            parameters.pop("password", None)  # SQLite's driver knows no password

        with engine.connect():
            pass
        engine.dispose()
        assert "secret" not in repr(engine)
    assert [item.get("password") for item in seen] == ["secret", None]


def test_bare_login_decodes_and_keeps_the_rest() -> None:
    assert bare_login("https://a%3Ab:c@h:1/p?q=1") == ("https://h:1/p?q=1", "a:b", "c")
    assert bare_login("https://token@h") == ("https://h", "token", None)
    assert bare_login("https://h/x@y") == ("https://h/x@y", None, None)


# --- exceptions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        f"http://somebody:{ENCODED}@127.0.0.1:9",
        f"http://{ENCODED}@127.0.0.1:9",
        f"http://somebody:{ENCODED}@no-such-host.invalid",
        f"http://somebody:{ENCODED}@127.0.0.1:99999",
        f"http://somebody:{ENCODED}@[::1",
        f"https://127.0.0.1:9/?token={ENCODED}",
        f"postgresql://somebody:{ENCODED}@127.0.0.1:9/mlflow",
        f"postgresql://somebody@127.0.0.1:9/mlflow?password={ENCODED}",
        f"postgresql://somebody:{ENCODED}@127.0.0.1:port/mlflow",
        f"mysql+pymysql://somebody:{ENCODED}@127.0.0.1:9/mlflow",
        f"mysql+nosuchdriver://somebody:{ENCODED}@127.0.0.1:9/mlflow",
        f"mssql+pyodbc:///?odbc_connect=PWD%3D{ENCODED}",
        f"ftp://somebody:{ENCODED}@127.0.0.1:9",
        f"http:/somebody:{ENCODED}@127.0.0.1:9",
    ],
)
def test_no_exception_of_the_registry_carries_the_credential_of_its_uri(
    uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # 100 s otherwise
    with pytest.raises((InfraError, Refused)) as raised:
        Registry(load_settings().registry_uri).models()
    assert_clean(chain(raised.value), caplog.text)
    assert raised.value.__cause__ is None


def test_no_exception_of_an_s3_store_carries_a_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://me:{PLANTED.in_address('AWS_ENDPOINT_URL')}@127.0.0.1:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, PLANTED.of(name))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for work in (lambda: Store("s3://models/x").keys(""), lambda: make_buckets(("models",))):
        with pytest.raises((InfraError, Refused)) as raised:
            work()
        assert_clean(chain(raised.value))


@pytest.mark.parametrize("name", ["RECPRESS_STORE", "RECPRESS_TRITON"])
@pytest.mark.parametrize(
    "form", ["s3://me:{}@bucket/x", "http://me:{}@h", "s3:/me:{}@b", "me:{}@h:1"]
)
def test_an_unusable_store_is_named_without_its_credential(name: str, form: str) -> None:
    for secret in (PLANTED.of(name), PLANTED.in_address(name)):
        root = form.format(secret)
        try:
            uri = Store(root, name).root
        except SettingRefused as fault:
            assert_clean(chain(fault))
        else:
            assert uri.startswith("file://")  # a folder of that name


def test_settings_that_cannot_be_used_carry_no_input_in_their_chain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RECPRESS_DEVICE", f"http://me:{ENCODED}@host")
    with raises_code(SettingRefused, "variable_invalid", name="RECPRESS_DEVICE") as raised:
        load_settings()
    assert_clean(chain(raised.value))


class Foreign(Exception):
    """As libraries raise them: its text is not made from its arguments."""

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
    ("make", "kind"),
    [
        (ValueError, ValueError),
        (OSError, OSError),
        (registry_unavailable, RegistryUnavailable),
        (registry_refused, RegistryRefused),
        (Foreign, Foreign),
    ],
)
def test_an_exception_that_leaves_a_task_keeps_its_class_and_loses_its_secrets(
    make: Callable[[str], Exception], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED.of("AWS_SECRET_ACCESS_KEY"))
    text = f"http://me:{ENCODED}@host and {PLANTED.of('AWS_SECRET_ACCESS_KEY')}"

    @clean_exceptions()
    def work() -> None:
        try:
            raise ConnectionError(text)
        except ConnectionError as fault:
            raise make(text) from fault

    with pytest.raises(kind) as raised:
        work()
    assert_clean(chain(raised.value))
    assert "host" in str(raised.value)


def test_an_exception_without_secrets_keeps_its_cause() -> None:
    cause = SQLAlchemyError("no such table")
    with pytest.raises(ValueError, match="what") as raised, clean_exceptions():
        raise ValueError("what") from cause
    assert raised.value.__cause__ is cause


# --- logs ------------------------------------------------------------------------------------


def test_log_records_of_any_library_carry_no_credential(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", PLANTED.of("MLFLOW_TRACKING_TOKEN"))
    clean_log_records()
    log = logging.getLogger("some.library")
    try:
        raise ConnectionError(f"http://me:{ENCODED}@host", PLANTED.of("MLFLOW_TRACKING_TOKEN"))
    except ConnectionError:
        log.exception("could not reach %s", f"http://me:{ENCODED}@host")
    log.warning("%d%% of %s", 5, {"token": PLANTED.of("MLFLOW_TRACKING_TOKEN")})
    assert "ConnectionError" in caplog.text
    assert "5% of" in caplog.text
    assert_clean(caplog.text)
    assert "could not reach http://***@host" in caplog.text
