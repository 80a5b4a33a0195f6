"""Keep passwords, tokens and keys out of error messages, logs and URIs.

Error messages of libraries quote the address or the request that the library received. An address
may contain a login, which is a user and a password: ``scheme://user:password@host``. Three rules
keep credentials out of messages:

- A library receives an address without its password (``remove_login``,
  ``remove_database_secrets``), and the password separately (``move_login``, ``pass_to_driver``).
- Credentials in the message of a library are masked before it becomes part of another message
  (``mask_credentials``).
- The exception of a library is not the cause of another exception (``raise ... from None``),
  because Prefect writes the whole chain of causes to its database.

``clean_log_records`` cleans all log records, because libraries log too. Read this file before you
use a library's message.
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
MIN_SECRET_CHARACTERS = 6
"""Least characters of a variable's value that is masked; shorter ones may be ordinary words.

Logins in addresses are masked at any length.
"""

# Names of variables whose value is a secret, unless ``_NO_SECRET_NAME`` matches too: then the value
# is only the place or the kind of a secret (``AWS_WEB_IDENTITY_TOKEN_FILE``).
_SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|TOKEN(?![A-Z])|API_?KEY|AUTH_STRING|ACCESS_KEY(?!_ID)|"
    r"CREDENTIAL|PRIVATE_KEY"
)
_NO_SECRET_NAME = re.compile(r"(FILE|PATH|FOLDER|DIR|URL|URI|SCOPE|MODE|CLIENT)$")
# The login in a complete address within a text, up to its @.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/?#'\"<>:]*:[^\s?#'\"<>]*)@")
# A text that begins with a login: [scheme:][//]user[:password]@...
_ADDRESS = re.compile(
    r"(?:[A-Za-z][\w+.\-]*:/{0,2})?(?P<user>[^\s/:@]*)(?::(?P<password>\S*))?@(?=[^@]*$)"
)
# A secret parameter in the query of an address, such as ?token=...
_QUERY = re.compile(
    r"(?i)([?&;][\w.\-]*(?:token|secret|password|passwd|pwd|key|signature|sig|credential|auth)"
    r"[\w.\-]*=)[^&;\s'\"<>]+"
)
# Options of a database URI that are secret.
_SECRET_OPTION = re.compile(r"(?i)^(password|passwd|pwd|sslpassword|token|authtoken|secret)$")


def mask_credentials(message: object, *addresses: str) -> str:
    """Replace credentials in a text by ``***``.

    These are the credentials in environment variables (``find_secrets``), in ``addresses``, and in
    any address that the text contains.

    Args:
        message: an exception or a text.
        addresses: addresses whose credentials are removed too.
    """
    text, known_secrets = str(message), find_secrets()
    if addresses:  # skipped for log records, which are many
        found = {
            form
            for uri in addresses
            for secret in _find_address_secrets(uri)
            for form in _iterate_message_forms(secret)
        }
        known_secrets = tuple(sorted({*known_secrets, *found}, key=len, reverse=True))
    for secret in known_secrets:
        text = text.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))


def mask_first_line(message: object, *addresses: str, max_characters: int = 400) -> str:
    """Return the first line of a message without credentials, truncated to ``max_characters``."""
    return mask_credentials(message, *addresses).strip().partition("\n")[0][:max_characters]


def find_secrets() -> tuple[str, ...]:
    """Find the credentials in environment variables, in all forms that messages may contain.

    A credential is the value of a variable whose name indicates a secret; or, in a variable that
    contains an address, the password or a secret parameter of its query. Its forms are: unchanged,
    percent-encoded, escaped as by ``repr`` and, for a login, base64 as in HTTP basic
    authentication. Longer texts are first, so that replacing one leaves no part of another.
    """
    return _find_secrets(
        tuple(
            (name, value)
            for name, value in os.environ.items()
            if "://" in value or "@" in value or _is_secret(name) or name == MLFLOW_USER
        )
    )


def _is_secret(name: str) -> bool:
    """Return whether the name of a variable indicates that its value is a secret."""
    return _SECRET_NAME.search(name) is not None and _NO_SECRET_NAME.search(name) is None


@lru_cache(maxsize=8)
def _find_secrets(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Find the secrets in these variables; cached, because the environment rarely changes."""
    all_forms: set[str] = set()
    for name, value in variables:
        if _is_secret(name):
            all_forms.update(_iterate_message_forms(value))
            user, colon, password = value.partition(":")
            if colon and name.endswith("AUTH_STRING"):
                all_forms.update(_iterate_message_forms(password))
                all_forms.update(_iterate_message_forms(_encode_basic_login(user, password)))
        if "://" in value or "@" in value:
            for secret in _find_address_secrets(value):
                all_forms.update(_iterate_message_forms(secret))
    by_name = dict(variables)
    if login := by_name.get(MLFLOW_USER):
        all_forms.update(
            _iterate_message_forms(_encode_basic_login(login, by_name.get(MLFLOW_PASSWORD, "")))
        )
    return tuple(sorted(all_forms, key=len, reverse=True))


def _iterate_message_forms(secret: str) -> Iterator[str]:
    """Yield a secret in all forms that messages may contain, except very short ones."""
    for text in (secret, unquote(secret)):
        for form in (text, quote(text, safe=""), quote(text), quote_plus(text), repr(text)[1:-1]):
            if len(form) >= MIN_SECRET_CHARACTERS:
                yield form


def _encode_basic_login(user: str, password: str) -> str:
    """Encode a login as in HTTP basic authentication."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _find_address_secrets(uri: str) -> Iterator[str]:
    """Yield the password and the secret query parameters of an address; nothing for other text."""
    if match := _ADDRESS.match(uri.partition("?")[0]):
        user, password = match["user"], match["password"]
        yield user if password is None else password  # a token may be written as the user
        if password is not None:
            yield _encode_basic_login(unquote(user), unquote(password))
    for name, value in parse_qsl(uri.partition("?")[2]):
        if _QUERY.search(f"?{name}=x"):
            yield value


def remove_login(uri: str) -> tuple[str, str | None, str | None]:
    """Remove the login from an ``http(s)`` address.

    Returns:
        The address without login, the decoded user and the decoded password. The user is None if
        there is no login, and the password is None if the login has none.
    """
    parts = urlsplit(uri)
    login, separator, host = parts.netloc.rpartition("@")
    if not separator:
        return uri, None, None
    user, colon, password = login.partition(":")
    bare = urlunsplit(parts._replace(netloc=host))
    return bare, unquote(user), unquote(password) if colon else None


def remove_database_secrets(uri: str) -> tuple[str, dict[str, str]]:
    """Remove the password and other secret options from a database URI.

    Returns:
        The URI without them, and the removed values by the name of the driver's argument, for
        ``pass_to_driver``.

    Raises:
        ValueError: SQLAlchemy cannot parse the URI. The message does not quote it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError) as fault:
        raise ValueError(f"it is not a database URI ({type(fault).__name__})") from None
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
    """Pass secrets to the database driver at every connect, instead of in the URI.

    So the engine of SQLAlchemy, its messages and its ``repr`` contain only the URI without them.

    Args:
        uri: the URI without secrets, with which the engine is created.
        options: the values that ``remove_database_secrets`` removed, by the name of the driver's
            argument.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine, make_url

    key = (uri, tuple(sorted(options.items())))
    if not options or key in _registered_uris:
        return
    _registered_uris.add(key)
    url = make_url(uri)

    @event.listens_for(Engine, "do_connect")
    def connect(dialect: Any, _: Any, arguments: list[Any], parameters: dict[str, Any]) -> None:
        # The event is sent for the connects of every engine of this process.
        if dialect.name != url.get_backend_name():
            return
        positional, keywords = dialect.create_connect_args(url)
        if (list(arguments), parameters) == (list(positional), keywords):  # a connect to ``uri``
            parameters.update(options)


_registered_uris: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
"""URI and options of each call of ``pass_to_driver``, so that it adds one listener for each."""


def move_login(uri: str) -> str:
    """Move user and password of an ``http(s)`` registry to MLflow's environment variables.

    A login in the URI replaces one in the variables, as in an HTTP client. Child processes inherit
    the variables.

    Returns:
        The URI without login.

    Raises:
        ValueError: ``uri`` is not an address.
    """
    bare, user, password = remove_login(uri)
    if user is not None:
        os.environ[MLFLOW_USER] = user
        os.environ[MLFLOW_PASSWORD] = password or ""
    return bare


def move_registry_login() -> None:
    """Move the login in ``MLFLOW_TRACKING_URI`` to MLflow's other environment variables."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(("http://", "https://")) and "@" in uri:
        with suppress(ValueError):  # reported by the code that uses the address
            os.environ["MLFLOW_TRACKING_URI"] = move_login(uri)


@contextmanager
def clean_exceptions() -> Iterator[None]:
    """Remove credentials from an exception that the block or function raises, and its causes.

    The class of the exception is unchanged, so that callers can catch it as before.

    Raises:
        RuntimeError: the text of the exception cannot be cleaned; contains the cleaned text.
    """
    try:
        yield
    except Exception as fault:
        _clean_exception(fault)
        raise


def _clean_exception(fault: BaseException) -> None:
    """Remove credentials from the fields, arguments, attributes and causes of an exception.

    Raises:
        RuntimeError: the text of the exception cannot be cleaned; contains the cleaned text.
    """
    if isinstance(fault, CodedError):  # the sentence may truncate or omit fields
        fault.fields = {name: _clean_field(value) for name, value in fault.fields.items()}
    whole = "".join(traceback.format_exception_only(fault))
    if mask_credentials(whole) != whole:
        fault.args = tuple(
            argument if isinstance(argument, int | float | None) else mask_credentials(argument)
            for argument in fault.args
        )
        for name, value in vars(fault).items():
            if isinstance(value, str):
                setattr(fault, name, mask_credentials(value))
        # In some classes the text does not depend on the arguments or attributes.
        if (text := mask_credentials(fault)) != str(fault):
            raise RuntimeError(f"{type(fault).__name__}: {text}") from None
    earlier = fault.__cause__ or fault.__context__
    if earlier is not None:
        chain = "".join(traceback.format_exception(earlier))
        if mask_credentials(chain) != chain:
            fault.__cause__ = fault.__context__ = None


def _clean_field(value: Any) -> Any:
    """Return the value of an error's field without credentials."""
    if isinstance(value, list | tuple):
        return tuple(map(_clean_field, value))
    if isinstance(value, Mapping):
        return {name: _clean_field(item) for name, item in value.items()}
    if isinstance(value, int | float | None) or mask_credentials(value) == str(value):
        return value
    return mask_credentials(value)


def clean_log_records() -> None:
    """Clean the message and the traceback of every later log record."""
    change_records(_clean_record)


def _clean_record(record: logging.LogRecord) -> None:
    """Remove credentials from one log record, in place."""
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = mask_credentials(
            "".join(traceback.format_exception(*record.exc_info))
        ).rstrip()
    try:
        message = record.getMessage()
    except Exception:  # the format is wrong, which logging reports
        return
    if (safe := mask_credentials(message)) != message:
        record.msg, record.args = safe, ()
