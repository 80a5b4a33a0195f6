"""The model registry in MLflow, which serving teams read. It stores URIs, never model files.

A version's ``source`` is the URI of a release (what is published for one order) in the object
store. All tags of a version are set by the call that creates it, so no reader receives only some of
them. By default the registry is a SQLite file ("embedded": it needs mlflow-skinny, sqlalchemy and
alembic, but no server); an ``http(s)://`` address is an MLflow tracking server.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from compressors.contracts import Frozen
from infra.credentials import mask_first_line, move_login, pass_to_driver, remove_database_secrets
from infra.errors import RegistryOutage, RegistryRefused, RegistryUnavailable, SettingRefused
from infra.registry.limits import require_fit, require_name, require_order, shorten_description
from infra.registry.sqlite_file import create_or_migrate, read_order, registry_lock
from infra.settings import parse_sqlite_uri, public_uri

ORDER_TAG = "recpress.order"
CHAMPION = "champion"
CONFIRMED_TAG = "recpress.confirmed"
"""Tag of a model: the digest of the last ledger entry after which the alias was set.

The promotion ledger is the log of all decisions about the champion, with an entry for each.
"""

_SCHEME = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?://|https?://")

# Variables that MLflow reads. Its retries are few and short, so that a registry that is down is
# reported within seconds; the tasks that call it wait and retry themselves.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
# Error codes of MLflow: missing or wrong credentials, and requests that would fail again.
_CREDENTIAL_CODES = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
_PERMANENT_CODES = {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "NOT_FOUND",
    "NOT_IMPLEMENTED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}


class RegisteredVersion(Frozen):
    """One registered version of a model.

    Attributes:
        model: registered name of the model.
        version: number of the version.
        source: URI of the version's release.
        tags: text by the tag's name, such as the digest of the order.
        aliases: names that point to this version, such as ``champion``.
    """

    model: str
    version: str
    source: str
    tags: dict[str, str]
    aliases: tuple[str, ...]


class Registry:
    """The versions and aliases of every model.

    Args:
        uri: ``sqlite:///file`` (created if missing), ``http(s)://server``, or another database
            MLflow supports. No connection is opened before the first use.

    Raises:
        SettingRefused: ``uri`` is none of these.

    Every method may also raise ``RegistryUnavailable`` (a retry may help) or ``SettingRefused``
    (credentials or permissions are wrong).
    """

    def __init__(self, uri: str) -> None:
        if not _SCHEME.match(uri):
            raise SettingRefused("registry_scheme_unknown", scheme=uri.partition(":")[0])
        try:
            # MLflow prints the URI, so user and password go to its environment variables.
            self._uri = move_login(uri) if uri.startswith("http") else uri
        except ValueError:
            raise SettingRefused("registry_address_malformed") from None

    def publish(
        self, model: str, order: str, source: str, tags: dict[str, str], description: str
    ) -> RegisteredVersion:
        """Register a release as a version, or return the version that the order already has.

        Args:
            model: the registered model's name; created if missing.
            order: digest of the order that produced the release.
            source: the release artifact's URI.
            tags: tags of the version; a tag with the order's digest is added.
            description: text for people; shortened to the registry's limit.

        Raises:
            RegistryRefused: a name, tag or URI is longer than the registry can store, or has
                characters that it does not accept.
            RegistryUnavailable: another program deleted the new version.
        """
        tags = {**tags, ORDER_TAG: order}
        require_fit(model, order, source, tags)
        with self._write_lock():
            if existing := self.find_by_order(order, model):
                return existing
            with self._translate_errors():
                self._create_model(model)
                created = self._client.create_model_version(
                    name=model,
                    source=source,
                    tags=tags,
                    description=shorten_description(description),
                    await_creation_for=None,
                )
            # A server does not enforce unique tags, so another process may have created a version
            # of this order at the same time. Both processes then find both versions here, and each
            # deletes the version that it created unless that has the lowest number.
            winner = self.find_by_order(order, model)
            if winner is None:
                raise RegistryUnavailable(
                    "created_version_missing", model=model, version=created.version
                )
            if winner.version != str(created.version):
                self._delete(model, str(created.version))
            return winner

    def versions(self, model: str) -> tuple[RegisteredVersion, ...]:
        """List all versions of a model, newest first.

        Raises:
            RegistryRefused: there is no such model; lists the existing ones.
        """
        aliases = self._read_aliases(model)
        return self._search(f"name = '{model}'", aliases)

    def check(self) -> None:
        """Raise if the registry cannot be used; later calls for the same object check nothing.

        A registry that is a file is created if it is missing.

        Raises:
            RegistryUnavailable: the registry does not respond, or its file is locked.
            SettingRefused: the address, the credentials or the file cannot be used.
        """
        with self._translate_errors():
            _ = self._client

    def models(self) -> tuple[str, ...]:
        """List the names of all models, sorted."""
        with self._translate_errors():
            models = _fetch_all_pages(
                lambda token: self._client.search_registered_models(page_token=token)
            )
        return tuple(sorted(model.name for model in models))

    def version(self, model: str, ref: str) -> RegisteredVersion:
        """Return one version by its number (``"3"``) or alias (``"@champion"``).

        Raises:
            RegistryRefused: there is no such model, version or alias; lists the existing ones.
        """
        aliases = self._read_aliases(model)
        number = aliases.get(ref[1:]) if ref.startswith("@") else ref
        for version in self._search(f"name = '{model}'", aliases):
            if version.version == number:
                return version
        if ref.startswith("@"):
            known = tuple(f"@{alias}" for alias in sorted(aliases)) or ("none",)
            newest = tuple(item.version for item in self.versions(model)[:3]) or ("none",)
            raise RegistryRefused(
                "alias_missing", model=model, alias=ref, aliases=known, newest=newest
            )
        newest = tuple(item.version for item in self.versions(model)[:10]) or ("none",)
        raise RegistryRefused("version_missing", model=model, version=ref, newest=newest)

    def find_by_order(self, order: str, model: str) -> RegisteredVersion | None:
        """Return the version that this order produced, or None.

        A crash during concurrent publishing may leave several versions of one order. Of these, the
        version with the lowest number is returned, which ``publish`` also keeps.
        """
        require_order(order)
        aliases = self._read_aliases_if_any(model)
        if aliases is None:
            return None
        versions = self._search(f"name = '{model}' and tags.`{ORDER_TAG}` = '{order}'", aliases)
        return versions[-1] if versions else None

    def set_alias(self, model: str, alias: str, version: str) -> None:
        """Set an alias of a model to the version with this number.

        Raises:
            RegistryRefused: there is no such model or version, or MLflow does not accept the alias.
        """
        self.version(model, version)
        with self._write_lock(), self._translate_errors():
            self._client.set_registered_model_alias(model, alias, version)

    def repair(self, model: str, champion: str | None) -> bool:
        """Set the alias ``champion`` to the champion that the promotion ledger records.

        Args:
            model: the model's name.
            champion: version number of the champion; None removes the alias.

        Returns:
            Whether the alias was changed.
        """
        if self._read_aliases(model).get(CHAMPION) == champion:
            return False
        if champion is not None:
            self.set_alias(model, CHAMPION, champion)
        else:
            with self._write_lock(), self._translate_errors():
                self._client.delete_registered_model_alias(model, CHAMPION)
        return True

    def find_by_order_without_mlflow(self, order: str, model: str) -> RegisteredVersion | None:
        """Return the version of an order like ``find_by_order``, but without MLflow if possible.

        Importing MLflow takes about two seconds, so a registry that is a file is read directly.
        Then ``aliases`` of the result is empty, and the result is None if the file cannot be read.
        """
        file = parse_sqlite_uri(self._uri)
        if file is None:
            return self.find_by_order(order, model)
        require_order(order)
        row = read_order(file, model, ORDER_TAG, order)
        if row is None:
            return None
        version, source, tags = row
        return RegisteredVersion(model=model, version=version, source=source, tags=tags, aliases=())

    def confirm(self, model: str, decision: str) -> None:
        """Record in the model's tags that a change of champion was completed.

        Args:
            model: the model's name.
            decision: digest of the ledger entry.
        """
        with self._write_lock(), self._translate_errors():
            self._client.set_registered_model_tag(model, CONFIRMED_TAG, decision)

    def read_confirmation(self, model: str) -> str | None:
        """Return the digest of the ledger entry that ``confirm`` recorded last, or None.

        Raises:
            RegistryRefused: there is no such model.
        """
        require_name(model)
        with self._translate_errors():
            tags: dict[str, str] = self._client.get_registered_model(model).tags
        return tags.get(CONFIRMED_TAG)

    @cached_property
    def _client(self) -> Any:
        """The client of MLflow; creates or migrates a SQLite registry."""
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # MLflow logs each exception that it raises; ``_translate_errors`` reports it.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        with self._locked_file() as file:
            if file is not None:
                create_or_migrate(file)
            uri = self._uri
            if file is None and not uri.startswith("http"):
                # MLflow prints the URI, so passwords go to the database driver separately.
                uri, options = remove_database_secrets(uri)
                pass_to_driver(uri, options)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            # The first query makes MLflow check the tables. No model has an empty name, so the
            # query loads none.
            client.search_registered_models("name = ''", max_results=1)
        return client

    @contextmanager
    def _write_lock(self) -> Iterator[None]:
        """Hold the write lock of a SQLite registry."""
        with self._translate_errors():
            _ = self._client  # takes the same lock to create the file, so it must come first
        with self._locked_file():
            yield

    @contextmanager
    def _locked_file(self) -> Iterator[Path | None]:
        """Hold the lock of a SQLite registry and yield its file; for others, yield None."""
        file = parse_sqlite_uri(self._uri)
        if file is None:
            yield None
            return
        with registry_lock(file):
            yield file

    def _delete(self, model: str, version: str) -> None:
        """Delete a version, unless it is already deleted."""
        from mlflow.exceptions import MlflowException

        with self._translate_errors():
            try:
                self._client.delete_model_version(model, version)
            except MlflowException as fault:
                if fault.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def _create_model(self, model: str) -> None:
        """Create a model, unless it exists already."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model)
        except MlflowException as fault:
            if fault.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _read_aliases(self, model: str) -> dict[str, str]:
        """Return alias -> version of a model that must exist."""
        aliases = self._read_aliases_if_any(model)
        if aliases is None:
            models = tuple(self.models()) or ("none yet",)
            raise RegistryRefused("model_missing", model=model, models=models)
        return aliases

    def _read_aliases_if_any(self, model: str) -> dict[str, str] | None:
        """Return alias -> version, or None if there is no such model."""
        require_name(model)
        with self._translate_errors():
            from mlflow.exceptions import MlflowException

            try:
                registered = self._client.get_registered_model(model)
            except MlflowException as fault:
                if fault.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        return {alias: str(version) for alias, version in registered.aliases.items()}

    def _search(self, condition: str, aliases: dict[str, str]) -> tuple[RegisteredVersion, ...]:
        """Return the versions that match a condition in MLflow's syntax, newest first."""
        with self._translate_errors():
            entries = _fetch_all_pages(
                lambda token: self._client.search_model_versions(condition, page_token=token)
            )
        versions = (
            RegisteredVersion(
                model=entry.name,
                version=str(entry.version),
                source=entry.source or "",
                tags=dict(entry.tags),
                aliases=tuple(
                    sorted(
                        alias for alias, number in aliases.items() if number == str(entry.version)
                    )
                ),
            )
            for entry in entries
        )
        return tuple(sorted(versions, key=lambda entry: -int(entry.version)))

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translate errors of MLflow and its libraries to errors of this project."""
        for name, value in _ENVIRONMENT.items():  # MLflow reads some of them on import
            os.environ.setdefault(name, value)
        try:
            import alembic  # noqa: F401 (MLflow imports it late)
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import NoSuchModuleError, OperationalError, SQLAlchemyError
        except ImportError as fault:
            raise SettingRefused("registry_library_missing", module=fault.name) from None
        try:
            yield
        except MlflowException as fault:
            message = self._clean_message(fault.message)
            if fault.error_code in _CREDENTIAL_CODES:
                raise SettingRefused("registry_credentials_refused", problem=message) from None
            if "local path as a model version source" in message:
                raise RegistryRefused("source_is_local") from None
            if fault.error_code in _PERMANENT_CODES:
                raise RegistryRefused("registry_refused", problem=message) from None
            if "out-of-date database schema" in message:
                raise SettingRefused("registry_version_differs", problem=message) from None
            raise self._build_unavailable(message) from None
        except (NoSuchModuleError, ImportError) as fault:
            raise SettingRefused(
                "registry_driver_missing", problem=self._clean_message(fault)
            ) from None
        except (OperationalError, OSError) as fault:
            raise self._build_unavailable(self._clean_message(fault)) from None
        except (SQLAlchemyError, ValueError) as fault:
            raise SettingRefused(
                "registry_database_unusable", problem=self._clean_message(fault)
            ) from None

    def _build_unavailable(self, problem: str) -> RegistryUnavailable:
        """Return the error for a registry that does not respond.

        It is a ``RegistryOutage``, after which tasks wait and retry, only if the registry is a
        server: waiting does not repair a file.
        """
        if parse_sqlite_uri(self._uri) is None:
            return RegistryOutage("registry_no_answer", problem=problem)
        return RegistryUnavailable("registry_no_answer", problem=problem)

    def _clean_message(self, message: object) -> str:
        """Return the first line of a message without credentials and the options in the URI."""
        return mask_first_line(str(message).replace(self._uri, public_uri(self._uri)), self._uri)


def _fetch_all_pages(fetch_page: Callable[[str | None], Any]) -> list[Any]:
    """Collect the entries of every page; ``fetch_page`` receives the token of the next page."""
    entries: list[Any] = []
    token: str | None = None
    while True:
        page = fetch_page(token)
        entries.extend(page)
        token = page.token
        if not token:
            return entries
