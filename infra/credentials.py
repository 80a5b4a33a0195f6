"""Keep passwords, tokens and keys out of messages, logs and other programs' addresses.

Errors of libraries quote the address or the request they received. Three rules keep credentials out
of them: libraries receive an address without its password (``bare_login``); a library's message is
cleaned before it becomes part of ours (``cleaned``); and a library's exception is never the cause
of ours (``raise ... from None``), since Prefect writes whole chains to its database.
``clean_log_records`` applies ``cleaned`` to every log record of the process, for libraries that log
by themselves. Read this file before you use a library's message.
"""

import base64
import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit, urlunsplit

from compressors.contracts import CodedError
from infra.log_records import change_records

HIDDEN = "***"
MLFLOW_USER, MLFLOW_PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
SHORTEST = 6
"""Shorter values of variables are words that also stand elsewhere; addresses are always cleaned."""

_NAMED = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|TOKEN(?![A-Z])|API_?KEY|AUTH_STRING|ACCESS_KEY(?!_ID)|"
    r"CREDENTIAL|PRIVATE_KEY"
)
_FILE = re.compile(r"(FILE|PATH|FOLDER|DIR|URL|URI|SCOPE|MODE|CLIENT)$")
_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/?#'\"<>:]*:[^\s?#'\"<>]*)@")
_ADDRESS = re.compile(
    r"(?:[A-Za-z][\w+.\-]*:/{0,2})?(?P<user>[^\s/:@]*)(?::(?P<password>\S*))?@(?=[^@]*$)"
)
_QUERY = re.compile(
    r"(?i)([?&;][\w.\-]*(?:token|secret|password|passwd|pwd|key|signature|sig|credential|auth)"
    r"[\w.\-]*=)[^&;\s'\"<>]+"
)
_SECRET_OPTION = re.compile(r"(?i)^(password|passwd|pwd|sslpassword|token|authtoken|secret)$")


def cleaned(message: object, *addresses: str) -> str:
    """Remove from text all credentials in the environment or in an address that it contains.

    Args:
        message: a library's error or its text.
        addresses: further addresses whose credentials are removed.
    """
    text, known = str(message), secrets()
    if addresses:  # log records are cleaned without further addresses
        more = {form for uri in addresses for secret in _in_address(uri) for form in _forms(secret)}
        known = tuple(sorted({*known, *more}, key=len, reverse=True))
    for secret in known:
        text = text.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))


def first_line(message: object, *addresses: str, most: int = 400) -> str:
    """Return the first line of a library's error, cleaned and of bounded length."""
    return cleaned(message, *addresses).strip().partition("\n")[0][:most]


def secrets() -> tuple[str, ...]:
    """Return every credential in the environment in all forms that messages use, longest first.

    These are the values of variables with a secret's name, and the passwords and secret options of
    variables that are addresses. Forms: unchanged, percent-encoded, as ``repr`` writes them and,
    for logins, in the base64 of HTTP's basic authentication.
    """
    return _secrets(
        tuple(
            (name, value)
            for name, value in os.environ.items()
            if "://" in value or "@" in value or _is_secret(name) or name == MLFLOW_USER
        )
    )


def _is_secret(name: str) -> bool:
    return _NAMED.search(name) is not None and _FILE.search(name) is None


@lru_cache(maxsize=8)
def _secrets(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    found: set[str] = set()
    for name, value in variables:
        if _is_secret(name):
            found.update(_forms(value))
            user, colon, password = value.partition(":")
            if colon and name.endswith("AUTH_STRING"):
                found.update(_forms(password))
                found.update(_forms(_basic(user, password)))
        if "://" in value or "@" in value:
            for secret in _in_address(value):
                found.update(_forms(secret))
    given = dict(variables)
    if login := given.get(MLFLOW_USER):
        found.update(_forms(_basic(login, given.get(MLFLOW_PASSWORD, ""))))
    return tuple(sorted(found, key=len, reverse=True))


def _forms(secret: str) -> Iterator[str]:
    for text in (secret, unquote(secret)):
        for form in (text, quote(text, safe=""), quote(text), quote_plus(text), repr(text)[1:-1]):
            if len(form) >= SHORTEST:
                yield form


def _basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _in_address(uri: str) -> Iterator[str]:
    """Return the password and the secret options of an address; none for other text."""
    if found := _ADDRESS.match(uri.partition("?")[0]):
        user, password = found["user"], found["password"]
        yield user if password is None else password  # a token may be written as the user
        if password is not None:
            yield _basic(unquote(user), unquote(password))
    for name, value in parse_qsl(uri.partition("?")[2]):
        if _QUERY.search(f"?{name}=x"):
            yield value


def bare_login(uri: str) -> tuple[str, str | None, str | None]:
    """Split an ``http(s)`` address into the address without login, and the decoded login."""
    parts = urlsplit(uri)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return uri, None, None
    user, colon, password = login.partition(":")
    bare = urlunsplit(parts._replace(netloc=host))
    return bare, unquote(user), unquote(password) if colon else None


def bare_database(uri: str) -> tuple[str, dict[str, str]]:
    """Split a database URI into the URI without password, and the arguments its driver needs.

    Raises:
        ValueError: SQLAlchemy cannot parse it; the message does not quote it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError) as fault:
        raise ValueError(f"it is no database URI ({type(fault).__name__})") from None
    options = {} if url.password is None else {"password": str(url.password)}
    options |= {
        name: value
        for name, value in url.query.items()
        if _SECRET_OPTION.match(name) and isinstance(value, str)
    }
    url = url.difference_update_query([name for name in options if name in url.query])
    url = url._replace(password=None)
    return url.render_as_string(hide_password=False), options


def pass_to_driver(uri: str, options: Mapping[str, str]) -> None:
    """Pass the arguments that ``bare_database`` removed from a URI to the driver on every connect.

    The engine, its messages and its ``repr`` contain only the bare URI.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine, make_url

    key = (uri, tuple(sorted(options.items())))
    if not options or key in _passed:
        return
    _passed.add(key)
    url = make_url(uri)

    @event.listens_for(Engine, "do_connect")
    def connect(dialect: Any, _: Any, arguments: list[Any], parameters: dict[str, Any]) -> None:
        if dialect.name != url.get_backend_name():
            return
        first, named = dialect.create_connect_args(url)
        if (list(arguments), parameters) == (list(first), named):
            parameters.update(options)


_passed: set[tuple[str, tuple[tuple[str, str], ...]]] = set()


def move_login(uri: str) -> str:
    """Move user and password of an http(s) registry to MLflow's variables; return the bare URI.

    The result in the environment of this process and its children is the same as setting the
    variables separately. A login in the URI replaces that of the variables, as in an HTTP client.

    Raises:
        ValueError: it is no address.
    """
    bare, user, password = bare_login(uri)
    if user is not None:
        os.environ[MLFLOW_USER] = user
        os.environ[MLFLOW_PASSWORD] = password or ""
    return bare


def move_registry_login() -> None:
    """As ``move_login``, for ``MLFLOW_TRACKING_URI``, which has no login afterwards."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(("http://", "https://")) and "@" in uri:
        with suppress(ValueError):  # code that uses the address raises
            os.environ["MLFLOW_TRACKING_URI"] = move_login(uri)


@contextmanager
def clean_exceptions() -> Iterator[None]:
    """Clean an exception raised by a block or a decorated function, and its causes.

    Its class is unchanged, so callers handle it as before.
    """
    try:
        yield
    except Exception as fault:
        _clean_exception(fault)
        raise


def _clean_exception(fault: BaseException) -> None:
    if isinstance(fault, CodedError):  # also fields that its sentence shortens or omits
        fault.fields = {name: _cleaned_field(value) for name, value in fault.fields.items()}
    whole = "".join(traceback.format_exception_only(fault))
    if cleaned(whole) != whole:
        fault.args = tuple(
            argument if isinstance(argument, int | float | None) else cleaned(argument)
            for argument in fault.args
        )
        for name, value in vars(fault).items():
            if isinstance(value, str):
                setattr(fault, name, cleaned(value))
        if (left := cleaned(fault)) != str(fault):  # its text does not depend on its arguments
            raise RuntimeError(f"{type(fault).__name__}: {left}") from None
    earlier = fault.__cause__ or fault.__context__
    if earlier is not None:
        chain = "".join(traceback.format_exception(earlier))
        if cleaned(chain) != chain:
            fault.__cause__ = fault.__context__ = None


def _cleaned_field(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_cleaned_field, value))
    if isinstance(value, Mapping):
        return {name: _cleaned_field(item) for name, item in value.items()}
    if isinstance(value, int | float | None) or cleaned(value) == str(value):
        return value
    return cleaned(value)


def clean_log_records() -> None:
    """Clean the message and the traceback of every later log record."""
    change_records(_clean_record)


def _clean_record(record: logging.LogRecord) -> None:
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = cleaned("".join(traceback.format_exception(*record.exc_info))).rstrip()
    try:
        message = record.getMessage()
    except Exception:  # logging itself reports a wrong format
        return
    if (safe := cleaned(message)) != message:
        record.msg, record.args = safe, ()
