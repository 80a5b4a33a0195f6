"""Find what an order refers to (bundle, teachers, champion), and its result if it ran before.

The champion is the version in production. The ledger is the list of a model's promotions and
rollbacks in the store. A release is what is published for one order.

The command line calls this module before it starts the flow. It imports neither Prefect nor torch,
so the report of a repeated order is printed immediately.
"""

from collections.abc import Mapping

from compressors.contracts import Artifact, digest
from flows.terms import Terms
from infra.registry.ledger import Entry
from infra.settings import load_settings, public_uri
from tasks.bundles.bundle_ref import BundleRef, find_bundle, require_measurable
from tasks.bundles.teachers import Teacher, find_teachers
from tasks.orchestration.code_digest import recpress_version
from tasks.orchestration.documents import Finished
from tasks.orchestration.order_records import find_finished_order, order_of_request
from tasks.promotion.promotions import champion, champion_graph, promote_order, registry


def find_champions(order: Terms, bundle: BundleRef) -> dict[str, Artifact]:
    """Return the graph or engine of the current champion for each compared target.

    A compared target is one for which the compressed model is compared with other models. The
    returned value is empty if no limit of the order compares with the champion.
    """
    if not order.compares_with_champion():
        return {}
    targets = order.targets.list_compared_targets()
    graphs = {target: champion_graph(bundle.name, target) for target in targets}
    return {target: graph for target, graph in graphs.items() if graph is not None}


def resolve_teachers(order: Terms, bundle: BundleRef) -> tuple[Teacher, ...]:
    """Return the additional teachers that an order names."""
    return find_teachers(order.teachers, bundle)


def require_registry() -> None:
    """Raise if the registry cannot be used, so that an order fails before it computes anything.

    Raises:
        RegistryUnavailable: the registry does not respond.
        SettingRefused: its address or credentials are wrong.
    """
    registry().check()


def order_digest(
    order: Terms,
    bundle: BundleRef,
    champions: Mapping[str, Artifact],
    teachers: tuple[Teacher, ...] = (),
) -> str:
    """Return the digest that identifies an order: ``request_digest`` and recpress's version.

    It does not depend on recpress's source files; the cache keys of the tasks do.
    """
    return digest([request_digest(order, bundle, champions, teachers), recpress_version()])


def request_digest(
    order: Terms,
    bundle: BundleRef,
    champions: Mapping[str, Artifact],
    teachers: tuple[Teacher, ...] = (),
) -> str:
    """Return the digest of everything that determines an order's result, except the version.

    That is the order's fields, the bundle, the teachers and the champions. The field ``attempt`` is
    a number that users increase to run an order again.
    """
    hashes = [champion.sha256 for champion in champions.values()]
    return digest(
        {
            "model": bundle.artifact.sha256,
            "preset": order.preset,  # its steps change only with the version of recpress
            "steps": order.custom_steps(),
            "limits": list(order.limits),
            "targets": order.targets,
            "rules": order.rules,
            "budget": order.quality_budget(),
            "seed": order.seed,
            "teachers": [[item.artifact.sha256, item.architecture] for item in teachers],
            # One hash is not in a list, so that digests of earlier versions stay valid.
            "champion": hashes[0] if len(hashes) == 1 else hashes or None,
            "architecture": bundle.architecture,
            "attempt": order.attempt,
            "threads": load_settings().threads,
        }
    )


def current_order_digest(order: Terms) -> str:
    """Return the digest of an order with its current bundle, champion and teachers.

    Raises:
        CompressionError: the order has a metric that is not measured for this bundle.
    """
    return order_digest(*_resolve(order))


def _resolve(
    order: Terms,
) -> tuple[Terms, BundleRef, dict[str, Artifact], tuple[Teacher, ...]]:
    """Find an order's current bundle, champions and teachers; the arguments of its digest."""
    bundle = find_bundle(order.model)
    require_measurable(bundle, order.limits)
    return order, bundle, find_champions(order, bundle), resolve_teachers(order, bundle)


def format_already_completed(finished: Finished) -> str:
    """Format the message that an order was completed before, and by which version of recpress."""
    version = finished.report.recpress_version
    # The version is empty if the report is from a release of recpress that did not record it.
    by = f" by recpress {version}" if version not in {"", recpress_version()} else ""
    hint = " Use --force, or a new 'attempt', to run it again." if by else ""
    return f"Order {finished.report.order[:12]} was completed before{by}.{hint}"


def promote_if_ordered(order: Terms, finished: Finished) -> None:
    """Promote an accepted result to champion, if the order has ``promote``."""
    report = finished.report
    if order.promote and report.outcome == "accepted":
        promote_order(report.name, report.order, f"order {report.order[:12]}")


def current_champion(order: Terms) -> Entry | None:
    """Return the ledger entry of the current champion of the order's model."""
    return champion(find_bundle(order.model).name)


def format_promotion(entry: Entry) -> str:
    """Format a sentence with the champion of a ledger entry and the champion before it."""
    before = "there was none" if entry.previous is None else f"was version {entry.previous}"
    return f"version {entry.version} is champion ({before})."


def format_promotion_result(order: Terms, finished: Finished, before: Entry | None) -> str:
    """Format a sentence that says whether an order with ``promote`` changed the champion.

    Args:
        order: an order with ``promote``.
        finished: its result.
        before: the champion before the order ran.
    """
    outcome = finished.report.outcome
    if outcome != "accepted":
        current = "there is no champion"
        if before is not None:
            current = f"version {before.version} stays champion"
        return (
            f"Not promoted: version {finished.version} is {outcome}, and only an accepted version "
            f"becomes champion; {current}."
        )
    champion = current_champion(order)
    if champion is None or champion.order != finished.report.order:
        event = "there is no champion now"
        if champion is not None:
            event = f"version {champion.version} was promoted after it"
        return f"Not champion: version {finished.version} was promoted, and {event}."
    if before is not None and before.order == champion.order:
        return f"Version {finished.version} is champion already."
    return f"Promoted: {format_promotion(champion)}"


def reuse_completed_result(order: Terms) -> Finished | None:
    """Find the result of an order that ran before, and promote it if the order has ``promote``."""
    result = find_completed_result(order)
    if result is not None:
        promote_if_ordered(order, result)
    return result


def find_completed_result(order: Terms) -> Finished | None:
    """Find the result of the same order in the registry; None if it is not registered.

    This includes results of other versions of recpress: after an upgrade, an order does not run
    again unless its ``attempt`` changes. The result's ``version`` is the current one in this
    registry.

    Raises:
        CompressionError: the order has a metric that is not measured for this bundle.
    """
    resolved = _resolve(order)
    result = _find_registered_result(order_digest(*resolved))
    return result or find_result_of_other_version(*resolved)


def find_result_of_other_version(
    order: Terms,
    bundle: BundleRef,
    champions: Mapping[str, Artifact],
    teachers: tuple[Teacher, ...] = (),
) -> Finished | None:
    """Find the latest result of the same order by another version of recpress; None if none."""
    digest_of_order = order_of_request(request_digest(order, bundle, champions, teachers))
    if digest_of_order in {None, order_digest(order, bundle, champions, teachers)}:
        return None
    return _find_registered_result(digest_of_order)


def _find_registered_result(digest_of_order: str) -> Finished | None:
    """Return the result with an order digest if it is stored and the registry has its release."""
    result = find_finished_order(digest_of_order)
    if result is None:
        return None
    uri = load_settings().registry_uri
    registered = registry().find_by_order_without_mlflow(result.report.order, result.report.name)
    if registered is None or registered.tags.get("recpress.release") != result.release.sha256:
        return None  # the flow publishes it again
    return result.model_copy(update={"version": registered.version, "registry": public_uri(uri)})
