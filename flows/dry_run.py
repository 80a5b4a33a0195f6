"""Dry run of a recipe: predict its steps and bytes from the shapes of a bundle, without data.

A dry run cannot know which pruning steps the quality budget will accept, nor how many rows will be
pruned, which depends on the training data. ``weight_byte_bounds`` therefore returns the fewest and
most bytes.
"""

from typing import Literal, NamedTuple

from compressors.contracts import Artifact, Bench, Part, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.units import stored_bytes
from compressors.errors.compression import CompressionError, NothingToCompress
from flows.order import Order
from flows.step_selection import can_be_judged, parts_of_step, select_steps, split_name
from tasks.bundles.bundle_ref import BundleRef
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import NotApplicable, not_applicable

Cuts = Literal["all", "most", "none"]
"""An assumption about the pruning steps of a recipe that an order compares with its budget.

- ``all``: all are within the budget.
- ``most``: all are within the budget, and each prunes as much as it may.
- ``none``: none is within the budget.
"""


class RecipeDryRun(NamedTuple):
    """The result of a dry run.

    Attributes:
        stages: name and model of each stage: the untouched model, then each applied step.
        left_out: reasons of skipped steps, by the step's index in the recipe.
    """

    stages: tuple[tuple[str, Model], ...]
    left_out: dict[int, Reason]


def dry_run_recipe(
    order: Order,
    bundle: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
    cuts: Cuts = "all",
) -> RecipeDryRun:
    """Dry-run a recipe without data and without training.

    Args:
        order: the order with the steps.
        bundle: the order's bundle.
        signature: the bundle's signature.
        model: the bundle's model.
        teachers: the teachers of the distillation steps.
        cuts: the assumption about pruning steps.

    Raises:
        CompressionError: no step fits, or a step of preset ``custom`` cannot be applied.
    """

    def dry_run_step(step: AnyStep, source: Model) -> Model | NotApplicable:
        splits = _row_counts(parts_of_step(step, bundle), bundle)
        bench = Bench(signature=signature, teachers=teachers, **splits)
        try:
            return dry_run(step, source, bench, smallest=cuts == "most")
        except NothingToCompress as fault:
            return not_applicable(fault)
        except CompressionError as fault:
            if order.preset == "custom":
                raise
            return not_applicable(fault)

    def budget_violation(_: Model) -> Reason | None:
        return Reason("not_within_budget") if cuts == "none" else None

    check = budget_violation if can_be_judged(order, bundle) else None
    return RecipeDryRun(*select_steps(order, bundle, model, dry_run_step, check))


def weight_byte_bounds(
    order: Order,
    bundle: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
) -> tuple[int, int]:
    """Return the fewest and the most bytes of weights that a recipe can result in."""
    # If nothing is uncertain, two dry runs would return the same bytes.
    is_uncertain = can_be_judged(order, bundle) or any(
        step.requires_budget for step in order.recipe()
    )
    extremes: tuple[Cuts, ...] = ("most", "none") if is_uncertain else ("all",)
    sizes = []
    for cuts in extremes:
        try:
            stages, _ = dry_run_recipe(order, bundle, signature, model, teachers, cuts)
            sizes.append(stored_bytes(stages[-1][1].module))
        except CompressionError:  # no step is within the budget: the model is unchanged
            sizes.append(stored_bytes(model.module))
    return min(sizes), max(sizes)


def min_weight_bytes(order: Order, bundle: BundleRef) -> int:
    """Load a bundle and return the fewest bytes of weights that a recipe can result in."""
    loaded = load_bundle(bundle.artifact)
    return weight_byte_bounds(order, bundle, loaded.manifest.signature, loaded.model, ())[0]


def _row_counts(parts: tuple[Part, ...], bundle: BundleRef) -> dict[str, Split]:
    """Return splits with the row counts that a step would read, but with no data."""
    return {
        part: Split(path="", sha256="0" * 64, rows=bundle.rows[split_name(part, bundle)])
        for part in parts
    }
