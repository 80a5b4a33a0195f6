"""What an order means today: its subject, its champion, its digest. No Prefect, no torch.

The command line asks this before it starts anything, so an order that was carried out before is
answered at once.
"""

from compressors.contracts import Artifact, digest
from flows.terms import Terms
from infra.ledger import Entry
from infra.settings import load_settings, shown
from tasks.documents import Finished
from tasks.order_records import finished
from tasks.promotion import champion, champion_graph, promote_order, registry
from tasks.stored import code_digest
from tasks.subject import Subject, find, need_measurable
from tasks.teachers import Teacher, find_teachers


def champion_of(order: Terms, subject: Subject) -> Artifact | None:
    """What production runs now, if the order compares with it."""
    return champion_graph(subject.name) if order.against_champion() else None


def teachers_of(order: Terms, subject: Subject) -> tuple[Teacher, ...]:
    """The models an order names as teachers beside its own."""
    return find_teachers(order.teachers, subject)


def require_registry() -> None:
    """Require that the registry answers, before anything is computed for it.

    Raises:
        RegistryUnavailable: it does not.
        SettingRefused: its address or credentials are wrong.
    """
    registry().check()


def order_digest(
    order: Terms,
    subject: Subject,
    champion: Artifact | None,
    teachers: tuple[Teacher, ...] = (),
) -> str:
    """The name of everything a result is made from; equal orders have equal results."""
    return digest(
        {
            "model": subject.artifact.sha256,
            "preset": order.preset,  # what a preset stands for is part of the code
            "steps": order.own_steps(),
            "limits": list(order.limits),
            "targets": order.targets,
            "rules": order.rules,
            "budget": order.quality_budget(),
            "seed": order.seed,
            "teachers": [[held.artifact.sha256, held.architecture] for held in teachers],
            "champion": None if champion is None else champion.sha256,
            "code": code_of(order, subject),
        }
    )


def digest_now(order: Terms) -> str:
    """The digest of an order as it is now: of its bundle, champion and teachers of this moment.

    Raises:
        CompressionError: the order has a metric that is not measured for this bundle.
    """
    subject = find(order.model)
    need_measurable(subject, order.limits)
    return order_digest(order, subject, champion_of(order, subject), teachers_of(order, subject))


def code_of(order: Terms, subject: Subject) -> str:
    """What every task of an order carries in its cache key beside its own arguments."""
    return digest([code_digest(), subject.architecture, order.attempt])


def promote_if_ordered(order: Terms, finished: Finished) -> None:
    """Move the champion to an accepted result, if the order says so."""
    report = finished.report
    if order.promote and report.outcome == "accepted":
        promote_order(report.name, report.order, f"order {report.order[:12]}")


def champion_now(order: Terms) -> Entry | None:
    """The ledger entry of the order's model that is champion now."""
    return champion(find(order.model).name)


def promotion(order: Terms, finished: Finished, before: Entry | None) -> str:
    """Describe in a sentence whether an order with ``promote`` changed the champion.

    Args:
        order: with ``promote``.
        finished: its result.
        before: the champion before the order was carried out.
    """
    from flows.console import promoted

    outcome = finished.report.outcome
    if outcome != "accepted":
        kept = "there is no champion"
        if before is not None:
            kept = f"version {before.version} stays champion"
        return (
            f"Not promoted: version {finished.version} is {outcome}, and only an accepted version "
            f"becomes champion; {kept}."
        )
    now = champion_now(order)
    if now is None or now.order != finished.report.order:
        other = "there is no champion now"
        if now is not None:
            other = f"version {now.version} was promoted after it"
        return f"Not champion: version {finished.version} was promoted, and {other}."
    if before is not None and before.order == now.order:
        return f"Version {finished.version} is champion already."
    return f"Promoted: {promoted(now)}"


def earlier(order: Terms) -> Finished | None:
    """The finished report of the same order, if there is one; promoted where the order asks."""
    found = already(order)
    if found is not None:
        promote_if_ordered(order, found)
    return found


def already(order: Terms) -> Finished | None:
    """The finished report of the same order, if the registry still has it; changes nothing.

    The version is the number the order has in this registry now.

    Raises:
        CompressionError: the order has a metric that is not measured for this bundle.
    """
    found = finished(digest_now(order))
    if found is None:
        return None
    uri = load_settings().registry_uri
    held = registry().find_order(found.report.order, found.report.name)
    if held is None or held.tags.get("recpress.release") != found.release.sha256:
        return None  # the flow publishes it again
    return found.model_copy(update={"version": held.version, "registry": shown(uri)})
