"""The model registry: MLflow, which serving teams read. It holds pointers, never bytes.

A version's ``source`` is the URI of a release in the object store; everything that is known
about it travels as tags of the one call that creates it, so no reader ever sees half of them.
The embedded registry is a SQLite file (mlflow-skinny, sqlalchemy and alembic); ``http(s)://``
is a tracking server of your own.
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
from infra.credentials import bare_database, first_line, move_login, pass_to_driver
from infra.errors import RegistryOutage, RegistryRefused, RegistryUnavailable, SettingRefused
from infra.registry.limits import require_fit, require_name, require_order, shortened
from infra.registry.sqlite_file import alone, prepare, read_order
from infra.settings import shown, sqlite_file

ORDER_TAG = "recpress.order"
CHAMPION = "champion"
CONFIRMED_TAG = "recpress.confirmed"

_SCHEME = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?://|https?://")

# A registry that is down is reported within seconds; orders wait and try again on top of this.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_FORBIDDEN = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
_REFUSED = {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "NOT_FOUND",
    "NOT_IMPLEMENTED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}


class Registered(Frozen):
    """One registered version."""

    model: str
    version: str
    source: str
    tags: dict[str, str]
    aliases: tuple[str, ...]


class Registry:
    """The versions and aliases of every model.

    Args:
        uri: ``sqlite:///file`` (made if it does not exist), ``http(s)://server``, or another
            database MLflow knows. Nothing is opened before the first use.

    Raises:
        SettingRefused: ``uri`` is none of these.

    Every method may also raise ``RegistryUnavailable`` (a retry may help) or ``SettingRefused``
    (credentials or permissions are wrong).
    """

    def __init__(self, uri: str) -> None:
        if not _SCHEME.match(uri):
            raise SettingRefused("registry_scheme_unknown", scheme=uri.partition(":")[0])
        try:
            self._uri = move_login(uri) if uri.startswith("http") else uri
        except ValueError:
            raise SettingRefused("registry_address_malformed") from None

    def publish(
        self, model: str, order: str, source: str, tags: dict[str, str], description: str
    ) -> Registered:
        """Register a release once: the version with this order digest, made if need be.

        Args:
            model: the registered model's name; made if need be.
            order: digest of the order the release was made by.
            source: the release artifact's URI.
            tags: everything that is known about it, written in the call that creates it.
            description: for people; shortened to what the registry can keep.

        Raises:
            RegistryRefused: a name, tag or URI is longer than the registry keeps, or has characters
                it does not take.
        """
        tags = {**tags, ORDER_TAG: order}
        require_fit(model, order, source, tags)
        with self._writing():
            if found := self.by_order(order, model):
                return found
            with self._translated():
                self._make_model(model)
                created = self._client.create_model_version(
                    name=model,
                    source=source,
                    tags=tags,
                    description=shortened(description),
                    await_creation_for=None,
                )
            # A server has no unique tags. Another process that created a version of this order
            # meanwhile sees both as well, and both keep the lower one.
            winner = self.by_order(order, model)
            if winner is None:
                raise RegistryUnavailable(
                    "created_version_missing", model=model, version=created.version
                )
            if winner.version != str(created.version):
                self._delete(model, str(created.version))
            return winner

    def versions(self, model: str) -> tuple[Registered, ...]:
        """All versions of a model, newest first.

        Raises:
            RegistryRefused: there is no such model; it names those there are.
        """
        aliases = self._aliases(model)
        return self._search(f"name = '{model}'", aliases)

    def check(self) -> None:
        """Require that the registry answers."""
        with self._translated():
            _ = self._client

    def models(self) -> tuple[str, ...]:
        """The names of all models, sorted."""
        with self._translated():
            found = _all_pages(
                lambda token: self._client.search_registered_models(page_token=token)
            )
        return tuple(sorted(model.name for model in found))

    def version(self, model: str, ref: str) -> Registered:
        """One version by number (``"3"``) or alias (``"@champion"``).

        Raises:
            RegistryRefused: there is no such model, version or alias; it names those there are.
        """
        aliases = self._aliases(model)
        number = aliases.get(ref[1:]) if ref.startswith("@") else ref
        for found in self._search(f"name = '{model}'", aliases):
            if found.version == number:
                return found
        if ref.startswith("@"):
            known = tuple(f"@{alias}" for alias in sorted(aliases)) or ("none",)
            newest = tuple(found.version for found in self.versions(model)[:3]) or ("none",)
            raise RegistryRefused(
                "alias_missing", model=model, alias=ref, aliases=known, newest=newest
            )
        newest = tuple(found.version for found in self.versions(model)[:10]) or ("none",)
        raise RegistryRefused("version_missing", model=model, version=ref, newest=newest)

    def by_order(self, order: str, model: str) -> Registered | None:
        """The version made by this order, or None.

        Of several (left by a crash between two racers) it is the one with the lowest number,
        which is the one ``publish`` keeps.
        """
        require_order(order)
        aliases = self._aliases_if_any(model)
        if aliases is None:
            return None
        found = self._search(f"name = '{model}' and tags.`{ORDER_TAG}` = '{order}'", aliases)
        return found[-1] if found else None

    def point(self, model: str, alias: str, version: str) -> None:
        """Let an alias name this version.

        Raises:
            RegistryRefused: there is no such model or version, or MLflow does not take the alias.
        """
        self.version(model, version)
        with self._writing(), self._translated():
            self._client.set_registered_model_alias(model, alias, version)

    def repair(self, model: str, champion: str | None) -> bool:
        """Make the alias ``champion`` say what the ledger says.

        Args:
            model: the model's name.
            champion: the ledger's version; None if it names none.

        Returns:
            Whether the alias had to change.
        """
        if self._aliases(model).get(CHAMPION) == champion:
            return False
        if champion is not None:
            self.point(model, CHAMPION, champion)
        else:
            with self._writing(), self._translated():
                self._client.delete_registered_model_alias(model, CHAMPION)
        return True

    def find_order(self, order: str, model: str) -> Registered | None:
        """As ``by_order``, without MLflow's library where the registry is a file.

        For a quick look: a file that cannot be read has no version, and ``aliases`` is empty.
        """
        file = sqlite_file(self._uri)
        if file is None:
            return self.by_order(order, model)
        require_order(order)
        found = read_order(file, model, ORDER_TAG, order)
        if found is None:
            return None
        version, source, tags = found
        return Registered(model=model, version=version, source=source, tags=tags, aliases=())

    def confirm(self, model: str, decision: str) -> None:
        """Record at the model that a change of champion was carried out to its end.

        Args:
            model: the model's name.
            decision: digest of the ledger's entry.
        """
        with self._writing(), self._translated():
            self._client.set_registered_model_tag(model, CONFIRMED_TAG, decision)

    def confirmed(self, model: str) -> str | None:
        """The decision that ``confirm`` recorded last, or None."""
        require_name(model)
        with self._translated():
            tags: dict[str, str] = self._client.get_registered_model(model).tags
        return tags.get(CONFIRMED_TAG)

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # It logs what it raises, with a traceback; we translate that.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        with self._alone() as file:
            if file is not None:
                prepare(file)
            uri = self._uri
            if file is None and not uri.startswith("http"):
                uri, options = bare_database(uri)
                pass_to_driver(uri, options)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            # Opens the store, which checks the tables. No model has this name, so that no model
            # is loaded with its versions and tags.
            client.search_registered_models("name = ''", max_results=1)
        return client

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One process at a time writes to a registry that is a file."""
        with self._translated():
            _ = self._client  # prepares the file under the same lock
        with self._alone():
            yield

    @contextmanager
    def _alone(self) -> Iterator[Path | None]:
        """Where the registry is a file, one process at a time; gives the file."""
        file = sqlite_file(self._uri)
        if file is None:
            yield None
            return
        with alone(file):
            yield file

    def _delete(self, model: str, version: str) -> None:
        """Delete a version; that it is deleted already is as good."""
        from mlflow.exceptions import MlflowException

        with self._translated():
            try:
                self._client.delete_model_version(model, version)
            except MlflowException as fault:
                if fault.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def _make_model(self, model: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model)
        except MlflowException as fault:
            if fault.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _aliases(self, model: str) -> dict[str, str]:
        """Alias -> version of a model that must exist."""
        aliases = self._aliases_if_any(model)
        if aliases is None:
            models = tuple(self.models()) or ("none yet",)
            raise RegistryRefused("model_missing", model=model, models=models)
        return aliases

    def _aliases_if_any(self, model: str) -> dict[str, str] | None:
        """Alias -> version, or None if there is no such model."""
        require_name(model)
        with self._translated():
            from mlflow.exceptions import MlflowException

            try:
                found = self._client.get_registered_model(model)
            except MlflowException as fault:
                if fault.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        return {alias: str(version) for alias, version in found.aliases.items()}

    def _search(self, wanted: str, aliases: dict[str, str]) -> tuple[Registered, ...]:
        with self._translated():
            found = _all_pages(
                lambda token: self._client.search_model_versions(wanted, page_token=token)
            )
        versions = (
            Registered(
                model=entry.name,
                version=str(entry.version),
                source=entry.source or "",
                tags=dict(entry.tags),
                aliases=tuple(
                    sorted(alias for alias, at in aliases.items() if at == str(entry.version))
                ),
            )
            for entry in found
        )
        return tuple(sorted(versions, key=lambda entry: -int(entry.version)))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Sort MLflow's and its libraries' errors by whether a retry may help."""
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
            message = self._message(fault.message)
            if fault.error_code in _FORBIDDEN:
                raise SettingRefused("registry_credentials_refused", problem=message) from None
            if "local path as a model version source" in message:
                raise RegistryRefused("source_is_local") from None
            if fault.error_code in _REFUSED:
                raise RegistryRefused("registry_refused", problem=message) from None
            if "out-of-date database schema" in message:
                raise SettingRefused("registry_version_differs", problem=message) from None
            raise self._unavailable_or_outage(message) from None
        except (NoSuchModuleError, ImportError) as fault:
            raise SettingRefused("registry_driver_missing", problem=self._message(fault)) from None
        except (OperationalError, OSError) as fault:
            raise self._unavailable_or_outage(self._message(fault)) from None
        except (SQLAlchemyError, ValueError) as fault:
            raise SettingRefused(
                "registry_database_unusable", problem=self._message(fault)
            ) from None

    def _unavailable_or_outage(self, problem: str) -> RegistryUnavailable:
        """An outage where the registry is a service; a file does not come back by waiting."""
        if sqlite_file(self._uri) is None:
            return RegistryOutage("registry_no_answer", problem=problem)
        return RegistryUnavailable("registry_no_answer", problem=problem)

    def _message(self, message: object) -> str:
        """The first line of a foreign message, without credentials and the URI's options."""
        return first_line(str(message).replace(self._uri, shown(self._uri)), self._uri)


def _all_pages(page_after: Callable[[str | None], Any]) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    while True:
        page = page_after(token)
        found.extend(page)
        token = page.token
        if not token:
            return found
