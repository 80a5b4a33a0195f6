"""Resolve an order: its bundle, its champion, its digest. No Prefect, no torch.

The command line calls this before it starts a flow, so the report of a repeated order is returned
immediately.
"""

from collections.abc import Mapping

from compressors.contracts import Artifact, digest
from flows.terms import Terms
from infra.registry.ledger import Entry
from infra.settings import load_settings, shown
from tasks.bundles.bundle_ref import BundleRef, find, require_measurable
from tasks.bundles.teachers import Teacher, find_teachers
from tasks.orchestration.code_digest import recpress_version
from tasks.orchestration.documents import Finished
from tasks.orchestration.order_records import finished, order_of_request
from tasks.promotion.promotions import champion, champion_graph, promote_order, registry


def champions_of(order: Terms, subject: BundleRef) -> dict[str, Artifact]:
    """Return what production runs now, by target; empty if the order does not compare with it."""
    if not order.against_champion():
        return {}
    graphs = {target: champion_graph(subject.name, target) for target in order.targets.compared()}
    return {target: graph for target, graph in graphs.items() if graph is not None}


def teachers_of(order: Terms, subject: BundleRef) -> tuple[Teacher, ...]:
    """Return the models that an order names as teachers, in addition to its model."""
    return find_teachers(order.teachers, subject)


def require_registry() -> None:
    """Raise if the registry does not respond, before anything is computed for it.

    Raises:
        RegistryUnavailable: the registry does not respond.
        SettingRefused: its address or credentials are wrong.
    """
    registry().check()


def order_digest(
    order: Terms,
    subject: BundleRef,
    champions: Mapping[str, Artifact],
    teachers: tuple[Teacher, ...] = (),
) -> str:
    """Return the digest of a request and of the version of recpress that runs it.

    It does not include sources: they are part of the cache keys of the tasks.
    """
    return digest([request_digest(order, subject, champions, teachers), recpress_version()])


def request_digest(
    order: Terms,
    subject: BundleRef,
    champions: Mapping[str, Artifact],
    teachers: tuple[Teacher, ...] = (),
) -> str:
    """Return the digest of an order's request: its terms, bundle, teachers and champions.

    One champion is in the digest as its hash alone, as in orders of earlier versions.
    """
    hashes = [champion.sha256 for champion in champions.values()]
    return digest(
        {
            "model": subject.artifact.sha256,
            "preset": order.preset,  # its steps change only with the version of recpress
            "steps": order.own_steps(),
            "limits": list(order.limits),
            "targets": order.targets,
            "rules": order.rules,
            "budget": order.quality_budget(),
            "seed": order.seed,
            "teachers": [[held.artifact.sha256, held.architecture] for held in teachers],
            "champion": hashes[0] if len(hashes) == 1 else hashes or None,
            "architecture": subject.architecture,
            "attempt": order.attempt,
            "threads": load_settings().threads,
        }
    )


def digest_now(order: Terms) -> str:
    """Return the digest of an order with its current bundle, champion and teachers.

    Raises:
        CompressionError: the order has a metric that is not measured for this bundle.
    """
    return order_digest(*_as_it_is_now(order))


def _as_it_is_now(
    order: Terms,
) -> tuple[Terms, BundleRef, dict[str, Artifact], tuple[Teacher, ...]]:
    """Return an order with its current bundle, champions and teachers."""
    subject = find(order.model)
    require_measurable(subject, order.limits)
    return order, subject, champions_of(order, subject), teachers_of(order, subject)


def carried_out_before(found: Finished) -> str:
    """Format the sentence that an order was completed, and by which version of recpress."""
    version = found.report.recpress_version
    by = f" by recpress {version}" if version not in {"", recpress_version()} else ""
    again = " Use --force, or a new 'attempt', to carry it out again." if by else ""
    return f"Order {found.report.order[:12]} was carried out before{by}.{again}"


def promote_if_ordered(order: Terms, finished: Finished) -> None:
    """Promote an accepted result to champion, if the order has ``promote``."""
    report = finished.report
    if order.promote and report.outcome == "accepted":
        promote_order(report.name, report.order, f"order {report.order[:12]}")


def champion_now(order: Terms) -> Entry | None:
    """Return the ledger entry of the current champion of the order's model."""
    return champion(find(order.model).name)


def promoted_sentence(entry: Entry) -> str:
    """Describe the version that a ledger entry made champion, and the champion before it."""
    was = "there was none" if entry.previous is None else f"was version {entry.previous}"
    return f"version {entry.version} is champion ({was})."


def promotion(order: Terms, finished: Finished, before: Entry | None) -> str:
    """Describe in a sentence whether an order with ``promote`` changed the champion.

    Args:
        order: an order with ``promote``.
        finished: its result.
        before: the champion before the order ran.
    """
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
    return f"Promoted: {promoted_sentence(now)}"


def earlier(order: Terms) -> Finished | None:
    """Return the finished report of the same order, if any; promoted if the order requires it."""
    found = carried_out_result(order)
    if found is not None:
        promote_if_ordered(order, found)
    return found


def carried_out_result(order: Terms) -> Finished | None:
    """Return the finished report of the same order if the registry has it; changes nothing.

    An order that another version of recpress completed counts as the same: after an upgrade nothing
    is compressed, registered or promoted again unless ``attempt`` changes. The registry version is
    the current number of the order in this registry.

    Raises:
        CompressionError: the order has a metric that is not measured for this bundle.
    """
    now = _as_it_is_now(order)
    return _registered(order_digest(*now)) or by_other_version(*now)


def by_other_version(
    order: Terms,
    subject: BundleRef,
    champions: Mapping[str, Artifact],
    teachers: tuple[Teacher, ...] = (),
) -> Finished | None:
    """Return the registered result of a request that another version completed last."""
    digest_of_order = order_of_request(request_digest(order, subject, champions, teachers))
    if digest_of_order in {None, order_digest(order, subject, champions, teachers)}:
        return None
    return _registered(digest_of_order)


def _registered(digest_of_order: str) -> Finished | None:
    """Return the finished report of an order digest, if the registry has its release."""
    found = finished(digest_of_order)
    if found is None:
        return None
    uri = load_settings().registry_uri
    registered = registry().find_order(found.report.order, found.report.name)
    if registered is None or registered.tags.get("recpress.release") != found.release.sha256:
        return None  # the flow publishes it again
    return found.model_copy(update={"version": registered.version, "registry": shown(uri)})
