"""Read the settings (folders, URIs, limits, permissions) from environment variables.

No setting is read from a bundle. The variable of a field is ``RECPRESS_<NAME>``. The S3 endpoint
and credentials (``AWS_*``) and ``MLFLOW_TRACKING_URI`` are read by their libraries and have no
field here. The file also converts and shortens URIs.
"""

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs, quote, unquote_to_bytes

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from compressors.contracts.value_errors import value_error
from infra.credentials import mask_credentials, move_registry_login
from infra.errors import SettingRefused


class RecpressSettings(BaseSettings):
    """The settings at the time of ``load_settings``; immutable."""

    model_config = SettingsConfigDict(env_prefix="RECPRESS_", frozen=True, extra="ignore")

    home: Path = Field(
        default=Path("~/.recpress"),
        description="Folder of the embedded store, the registry and the caches.",
    )
    store: str = Field(
        default="", description="Object store: a folder or s3://bucket/prefix. Default HOME/store."
    )
    triton: str = Field(
        default="",
        description="Triton model repository to which each new champion is written: a folder or "
        "s3://bucket/prefix. Empty: none.",
    )
    allowed_modules: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("examples",),
        description="Modules, with their submodules, that a network's class may be imported from.",
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda|cuda:\d+(,cuda:\d+)*|cpu(,cpu)+)$",
        description="Device of steps that train: cpu, cuda or cuda:1; several devices, such as "
        "cuda:0,cuda:1, share every batch.",
    )
    threads: int = Field(
        default=1, ge=1, description="Threads of one ONNX Runtime session while it is measured."
    )

    memory_mb: float | None = Field(
        default=None,
        gt=0,
        lt=2**40,
        description="MiB of memory that one process may use in total. Default: what the machine, "
        "its control group and the limits of the process leave.",
    )

    @field_validator("allowed_modules", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        """Accept a comma-separated list such as ``a,b.c``."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("home")
    @classmethod
    def _normalize(cls, value: Path) -> Path:
        """Return the folder as an absolute path without ``..``; symlinks are not resolved."""
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise value_error("home_not_utf8") from None
        if "\0" in str(value):
            raise value_error("home_with_null")
        try:
            value = value.expanduser()
        except RuntimeError as fault:
            raise value_error("home_of_unknown_user", problem=str(fault)) from None
        return Path(os.path.abspath(value))  # noqa: PTH100 (keeps symlinks)

    @property
    def store_root(self) -> str:
        """Root of the object store: the setting ``store``, or the folder ``store`` in ``home``."""
        return self.store or str(self.home / "store")

    @property
    def registry_uri(self) -> str:
        """URI of the registry: ``MLFLOW_TRACKING_URI``, or a SQLite file in ``home``."""
        return os.environ.get("MLFLOW_TRACKING_URI") or build_sqlite_uri(self.home / "registry.db")

    @property
    def cache(self) -> Path:
        """Folder for verified local copies of remote artifacts; it may be deleted."""
        return self.home / "cache"


def load_settings() -> RecpressSettings:
    """Read the settings from the environment.

    A login in ``MLFLOW_TRACKING_URI`` is moved to the variables that MLflow has for it.

    Raises:
        SettingRefused: the value of a variable is invalid.
    """
    move_registry_login()
    try:
        return RecpressSettings()
    except ValidationError as fault:
        first = fault.errors()[0]
        name = "RECPRESS_" + ".".join(str(part) for part in first["loc"]).upper()
        value = mask_credentials(repr(first["input"]))
        raise SettingRefused(
            "variable_invalid", name=name, problem=mask_credentials(first["msg"]), got=value
        ) from None


def build_sqlite_uri(file: Path) -> str:
    """Build the SQLAlchemy URI of a SQLite file, for any absolute path.

    In the usual form ``sqlite:///PATH`` the path ends at its first ``?``. So a path that contains
    ``?`` is written, percent-encoded, as a ``file:`` URI of SQLite. That form contains the driver
    (``sqlite+pysqlite``), because MLflow would use the text after ``sqlite:///`` as a path and
    create its folders.
    """
    if "?" not in str(file):
        return f"sqlite:///{file}"
    return f"sqlite+pysqlite:///file:{quote(str(file))}?uri=true"


def parse_sqlite_uri(uri: str) -> Path | None:
    """Return the path of the SQLite file that a SQLAlchemy URI refers to.

    SQLAlchemy uses the path of the form ``sqlite:///PATH`` literally, up to the first ``?``. With
    ``uri=true`` and ``file:``, SQLite decodes percent signs.

    Returns:
        The absolute path; None for any other database, or for a database in memory.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.partition("+")[0] != "sqlite":
        return None
    host, _, location = rest.partition("/")
    path, _, query = location.partition("?")
    options = parse_qs(query)
    if options.get("uri", [""])[-1].lower() in {"true", "yes", "on", "y", "t", "1"} and (
        path.startswith("file:")
    ):
        # SQLite allows an empty authority or "localhost" before the path.
        path = re.sub(r"^//(localhost)?(?=/|$)", "", path.removeprefix("file:"))
        path = os.fsdecode(unquote_to_bytes(path.partition("#")[0]))
        if options.get("mode") == ["memory"]:
            return None
    if host or path in {"", ":memory:"}:
        return None
    return Path(os.path.abspath(path))  # noqa: PTH100 (keeps symlinks, as SQLAlchemy does)


def public_uri(uri: str) -> str:
    """Reduce a URI to scheme, host and path, for messages, tags and reports.

    User, password and query are removed, because each of them can contain a credential. The path
    of a local file is unchanged.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        # "https:/user:password@host", with a slash missing, is not a path.
        is_address = re.match(r"[A-Za-z][\w+.-]*:", uri) and "@" in uri
        return (uri.rpartition("@")[2] if is_address else uri).partition("?")[0]
    if scheme.partition("+")[0] == "sqlite":
        file = parse_sqlite_uri(uri)
        return f"{scheme}://" if file is None else f"sqlite:///{file}"
    host, slash, path = rest.partition("?")[0].partition("/")
    if "@" in path:  # a password that contains a slash: only the text after the last @ is safe
        host, slash, path = path.rpartition("@")[2].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
