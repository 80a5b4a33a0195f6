"""Dry run of a recipe: its steps and bytes, from the bundle's shapes alone.

The quality budget decides between options, and training decides how many rows are looked up.
Neither is known before a recipe is applied, so bytes have bounds.
"""

from typing import Literal, NamedTuple

from compressors.contracts import Artifact, Bench, Part, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.units import stored_bytes
from compressors.errors.compression import CompressionError, NothingToCompress
from flows.choosing import allowed_steps, can_be_judged, parts_of_step, split_name
from flows.order import Order
from tasks.bundles.bundle_ref import BundleRef
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import NotApplicable, not_applicable

Cuts = Literal["all", "most", "none"]
"""Which judged cuts count as within the budget: all, all with as few rows as possible, or none."""


class RecipeDryRun(NamedTuple):
    """The result of a dry run: the model after each applied step, and the skipped steps."""

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
    """Dry-run a recipe, without data and without training.

    Args:
        order: the order with the steps.
        subject: the order's bundle.
        signature: the bundle's signature.
        model: the bundle's model.
        teachers: the teachers of the distillation steps.
        cuts: which of the cuts that the budget judges are applied.

    Raises:
        CompressionError: as ``flows.choosing.allowed_steps``.
    """

    def attempt(step: AnyStep, source: Model) -> Model | NotApplicable:
        counted = _rows(parts_of_step(step, subject), subject)
        bench = Bench(signature=signature, teachers=teachers, **counted)
        try:
            return dry_run(step, source, bench, smallest=cuts == "most")
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
    """Return the fewest and the most bytes of weights that a recipe can result in."""
    # Without either, the applied steps are known, and the two dry runs would be the same.
    open_ended = can_be_judged(order, subject) or any(
        step.requires_budget for step in order.recipe()
    )
    extremes: tuple[Cuts, ...] = ("most", "none") if open_ended else ("all",)
    sizes = []
    for cuts in extremes:
        try:
            stages, _ = dry_run_recipe(order, subject, signature, model, teachers, cuts)
            sizes.append(stored_bytes(stages[-1][1].module))
        except CompressionError:  # nothing is within the budget: the model is unchanged
            sizes.append(stored_bytes(model.module))
    return min(sizes), max(sizes)


def least_bytes(order: Order, subject: BundleRef, bundle: Artifact) -> int:
    """Return the fewest bytes of weights that a recipe can result in, for a pulled bundle."""
    loaded = load_bundle(bundle)
    return bounds(order, subject, loaded.manifest.signature, loaded.model, ())[0]


def _rows(parts: tuple[Part, ...], subject: BundleRef) -> dict[str, Split]:
    """Return the number of rows a step would read; a dry run prepares and reads none."""
    return {
        part: Split(path="", sha256="0" * 64, rows=subject.rows[split_name(part, subject)])
        for part in parts
    }
