"""Foresee a recipe: its steps and bytes, from the bundle's shapes alone.

What decides between options (the quality budget) and how many rows training looks up is not known
before a recipe is carried out, so bytes have bounds.
"""

from typing import Literal, NamedTuple

from compressors.contracts import Artifact, Bench, Part, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.units import stored_bytes
from compressors.errors.compression import CompressionError, NothingToCompress
from compressors.prune.tables.prune_rows import PruneRows
from flows.choosing import allowed_steps, can_be_judged, parts_of_step, split_name
from flows.order import Order
from tasks.bundles.bundle_ref import BundleRef
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import NotApplicable, not_applicable

Cuts = Literal["all", "most", "none"]
"""Which judged cuts count as within the budget: all, all with as few rows as possible, or none."""


class RecipeDryRun(NamedTuple):
    """A dry run: the model after each step that is carried out, and the steps left out."""

    stages: tuple[tuple[str, Model], ...]
    left_out: dict[int, Reason]


def dry_run_recipe(
    order: Order,
    subject: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
    cuts: Cuts = "all",
) -> RecipeDryRun:
    """Go through a recipe without data and without work.

    Args:
        order: whose steps.
        subject: the bundle they are for.
        signature: of its inputs.
        model: loaded from it.
        teachers: what teaching steps learn from.
        cuts: which of the cuts that the budget judges are taken.

    Raises:
        CompressionError: as ``flows.choosing.allowed_steps``.
    """

    def attempt(step: AnyStep, source: Model) -> Model | NotApplicable:
        counted = _rows(parts_of_step(step, subject), subject)
        bench = Bench(signature=signature, teachers=teachers, **counted)
        try:
            if cuts == "most" and isinstance(step, PruneRows) and step.min_lookups:
                return step.smallest_dry_run(source.private())
            return dry_run(step, source, bench)
        except NothingToCompress as fault:
            return not_applicable(fault)
        except CompressionError as fault:
            if order.preset == "custom":
                raise
            return not_applicable(fault)

    def spent(_: Model) -> Reason | None:
        return Reason("not_within_budget") if cuts == "none" else None

    judged = can_be_judged(order, subject)
    return RecipeDryRun(*allowed_steps(order, subject, model, attempt, spent if judged else None))


def bounds(
    order: Order,
    subject: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
) -> tuple[int, int]:
    """The fewest and the most bytes of weights that a recipe can result in."""
    # Without either, what is carried out is known, and the two dry runs would be the same.
    open_ended = can_be_judged(order, subject) or any(
        isinstance(step, PruneRows) for step in order.recipe()
    )
    extremes: tuple[Cuts, ...] = ("most", "none") if open_ended else ("all",)
    sizes = []
    for cuts in extremes:
        try:
            stages, _ = dry_run_recipe(order, subject, signature, model, teachers, cuts)
            sizes.append(stored_bytes(stages[-1][1].module))
        except CompressionError:  # nothing is within the budget: the model stays as it is
            sizes.append(stored_bytes(model.module))
    return min(sizes), max(sizes)


def least_bytes(order: Order, subject: BundleRef, bundle: Artifact) -> int:
    """The fewest bytes of weights that a recipe can result in, for a pulled bundle."""
    loaded = load_bundle(bundle)
    return bounds(order, subject, loaded.manifest.signature, loaded.model, ())[0]


def _rows(parts: tuple[Part, ...], subject: BundleRef) -> dict[str, Split]:
    """The rows a step would see, counted but not prepared: a dry run reads none."""
    return {
        part: Split(path="", sha256="0" * 64, rows=subject.rows[split_name(part, subject)])
        for part in parts
    }
