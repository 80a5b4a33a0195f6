"""Find the registry version and the report of a ledger entry. No Prefect.

The promotion ledger in the object store records every change of champion. Its entries and the
versions in the registry are matched by the digest of the order, not by version number: a rebuilt
registry may give the same number to another order.
"""

from dataclasses import dataclass

from infra.errors import PromotionRefused, Refused
from infra.registry.ledger import Entry, Ledger
from infra.registry.mlflow_registry import CHAMPION, ORDER_TAG, RegisteredVersion, Registry
from infra.settings import load_settings, public_uri
from tasks.orchestration.documents import Report, read_report
from tasks.orchestration.workspace import store
from tasks.promotion.acceptance import require_accepted


@dataclass(frozen=True)
class Version:
    """A version of the registry and the report of its release."""

    registered: RegisteredVersion
    report: Report

    @property
    def number(self) -> str:
        """The version's number in the registry."""
        return self.registered.version


def registry() -> Registry:
    """Return the registry of this process's settings."""
    return Registry(load_settings().registry_uri)


def read_version(registered: RegisteredVersion) -> Version:
    """Read the report of a registered version.

    Raises:
        PromotionRefused: the report is of another model or another order.
    """
    report = read_report(store().artifact(registered.source))
    model, order = registered.model, registered.tags.get(ORDER_TAG)
    if (report.name, report.order) != (model, order):
        raise PromotionRefused(
            "other_release",
            model=model,
            version=registered.version,
            expected=str(order),
            got_model=report.name,
            got=report.order,
        )
    return Version(registered, report)


def version_of_order(model: str, order: str) -> Version:
    """Return the registry version of an order.

    Raises:
        PromotionRefused: the registry does not have the order.
    """
    registered = registry().find_by_order(order, model)
    if registered is None:
        raise PromotionRefused(
            "order_not_registered", order=order, model=model, registry=_build_registry_uri()
        )
    return read_version(registered)


def version_of_entry(model: str, entry: Entry) -> Version:
    """Return the registry version of the order in a ledger entry, if its report is accepted.

    Raises:
        PromotionRefused: the registry does not have the order, or its report is not accepted.
    """
    registered = registry().find_by_order(entry.order, model)
    if registered is None:
        raise PromotionRefused(
            "champion_not_registered",
            order=entry.order,
            model=model,
            version=entry.version,
            by=entry.by,
            registry=_build_registry_uri(),
        )
    version = read_version(registered)
    require_accepted(model, version.number, version.report)
    return version


def _build_registry_uri() -> str:
    """Return the registry's URI without credentials."""
    return public_uri(load_settings().registry_uri)


def champion_versions() -> dict[str, str]:
    """Return the version number of the champion of every model that has a ledger.

    Raises:
        PromotionRefused: lists every model whose champion the registry does not have, or whose
            alias points to another version.
    """
    models = sorted({key.split("/")[1] for key in store().keys("ledger/")})
    numbers, problems = {}, []
    for model in models:
        try:
            numbers[model] = _read_champion_number(model)
        except Refused as fault:
            problems.append(f"{model}: {fault}")
    if problems:
        raise PromotionRefused("champions_unusable", problems="; ".join(problems))
    return numbers


def _read_champion_number(model: str) -> str:
    """Return the champion's version number, or "none"; raises if the alias is on another one."""
    entry = Ledger(store(), model).champion()
    if entry is None:
        return "none"
    version = version_of_entry(model, entry)
    if CHAMPION not in version.registered.aliases:
        raise PromotionRefused(
            "alias_elsewhere", model=model, version=version.number, alias=CHAMPION
        )
    return version.number
