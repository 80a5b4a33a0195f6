"""Where things are and what is allowed: read from the environment, never from a bundle.

Every field is ``RECPRESS_<NAME>``. S3 endpoint and credentials are the usual ``AWS_*`` variables
and ``MLFLOW_TRACKING_URI`` is MLflow's own; neither is repeated here.
"""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from infra.errors import SettingRefused


class RecpressSettings(BaseSettings):
    """One frozen reading of the environment."""

    model_config = SettingsConfigDict(env_prefix="RECPRESS_", frozen=True, extra="ignore")

    home: Path = Field(
        default=Path("~/.recpress"), description="Embedded store, registry and caches live here."
    )
    store: str = Field(
        default="", description="Object store: a folder or s3://bucket/prefix. Default HOME/store."
    )
    triton: str = Field(
        default="",
        description="Triton model repository that follows the champion: a folder or "
        "s3://bucket/prefix. Empty: none.",
    )
    allowed_modules: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("examples",),
        description="Modules (and what lies below them) an architecture may be imported from.",
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda|cuda:\d+(,cuda:\d+)*|cpu(,cpu)+)$",
        description="Where steps that train do so: cpu, cuda or cuda:1; several, such as "
        "cuda:0,cuda:1, share every batch.",
    )
    threads: int = Field(
        default=1, ge=1, description="Threads of one ONNX Runtime session while it is measured."
    )

    @field_validator("allowed_modules", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Accept ``a,b.c``, which is how people write lists in an environment variable."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def store_root(self) -> str:
        """The object store's root: what was set, or the folder ``store`` below ``home``."""
        return self.store or str(self.home / "store")

    @property
    def registry_uri(self) -> str:
        """MLflow's own variable, or a SQLite file below ``home``."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.home / 'registry.db'}"

    @property
    def cache(self) -> Path:
        """Verified local copies of remote artifacts; safe to delete."""
        return self.home / "cache"


def load_settings() -> RecpressSettings:
    """Read the environment.

    Raises:
        SettingRefused: a variable does not have the form its field needs.
    """
    try:
        return RecpressSettings()
    except ValidationError as fault:
        first = fault.errors()[0]
        name = "RECPRESS_" + ".".join(str(part) for part in first["loc"]).upper()
        raise SettingRefused(f"{name}: {first['msg']}; got {first['input']!r}.") from fault


def shown(uri: str) -> str:
    """A URI fit for messages, tags and reports: scheme, host and path, nothing secret.

    User, password and query are dropped; each of them can carry a credential.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri.partition("?")[0]
    host, slash, path = rest.partition("?")[0].partition("/")
    if "@" in path:  # a password with a slash in it: only what follows the last @ is safe
        host, slash, path = path.rpartition("@")[2].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
