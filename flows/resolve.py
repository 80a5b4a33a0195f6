"""What an order means today: its subject, its champion, its digest. No Prefect, no torch.

The command line asks this before it starts anything, so an order that was carried out before is
answered at once.
"""

from compressors.contracts import Artifact, digest
from flows.terms import Terms
from tasks.documents import Finished, finished, registry_is_there
from tasks.promotion import champion, champion_graph, promote
from tasks.stored import code_digest
from tasks.subject import Subject, find
from tasks.teachers import Teacher, find_teachers


def champion_of(order: Terms, subject: Subject) -> Artifact | None:
    """What production runs now, if the order compares with it."""
    return champion_graph(subject.name) if order.against_champion() else None


def teachers_of(order: Terms, subject: Subject) -> tuple[Teacher, ...]:
    """The models an order names as teachers beside its own."""
    return find_teachers(order.teachers, subject)


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


def code_of(order: Terms, subject: Subject) -> str:
    """What every task of an order carries in its cache key beside its own arguments."""
    return digest([code_digest(), subject.architecture, order.attempt])


def promote_if_ordered(order: Terms, finished: Finished) -> None:
    """Move the champion to an accepted result, where the order asks for it."""
    if order.promote and finished.report.outcome == "accepted":
        promote(finished.report.name, finished.version, f"order {finished.report.order[:12]}")


def champion_version(order: Terms) -> str | None:
    """The version of the order's model that is champion now."""
    return champion(find(order.model).name)


def promotion(order: Terms, finished: Finished, before: str | None) -> str:
    """What came of an order's wish to promote, in a sentence.

    Args:
        order: that asks for it.
        finished: its result.
        before: the version that was champion before the order was carried out.
    """
    from flows.console import promoted

    outcome = finished.report.outcome
    if outcome != "accepted":
        kept = f"version {before} stays champion" if before is not None else "there is no champion"
        return (
            f"Not promoted: version {finished.version} is {outcome}, and only an accepted version "
            f"becomes champion; {kept}."
        )
    now = champion_version(order)
    if now != finished.version:
        return (
            f"Not champion: version {finished.version} was promoted, and version {now} was "
            f"promoted after it."
        )
    said = promoted(finished.version, before)
    return f"Promoted: {said}" if now != before else f"{said[0].upper()}{said[1:]}"


def earlier(order: Terms) -> Finished | None:
    """The finished report of the same order, if there is one; promoted where the order asks."""
    found = already(order)
    if found is not None:
        promote_if_ordered(order, found)
    return found


def already(order: Terms) -> Finished | None:
    """The finished report of the same order, if there is one; only looked at."""
    subject = find(order.model)
    teachers = teachers_of(order, subject)
    found = finished(order_digest(order, subject, champion_of(order, subject), teachers))
    return found if found is not None and registry_is_there(found) else None
