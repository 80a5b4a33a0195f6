"""Dry run of a recipe: predict its steps and bytes from the shapes of a bundle, without data.

A dry run cannot know which pruning steps will be within the quality budget, nor how many rows will
be pruned, which depends on the training data. ``weight_byte_bounds`` therefore returns the fewest
and the most bytes. ``Part`` names a part of the bench, the data that a step may use.
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
from flows.step_selection import has_measurable_budget, parts_of_step, select_steps, split_name
from tasks.bundles.bundle_ref import BundleRef
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import NotApplicable, not_applicable

Assumption = Literal["largest", "smallest", "over_budget"]
"""What a dry run assumes about the results of pruning steps, which depend on data.

- ``largest``: each step prunes as little as its settings allow.
- ``smallest``: each step prunes as much as its settings allow.
- ``over_budget``: each step with a quality budget exceeds it and is undone; the others are as with
  ``largest``.
"""


class RecipeDryRun(NamedTuple):
    """The result of a dry run.

    Attributes:
        stages: name and model of each stage: the untouched model, then each applied step.
        skip_reasons: why steps were skipped, by the step's index in the recipe.
    """

    stages: tuple[tuple[str, Model], ...]
    skip_reasons: dict[int, Reason]


def dry_run_recipe(
    order: Order,
    bundle: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
    assumption: Assumption = "largest",
) -> RecipeDryRun:
    """Dry-run a recipe without data and without training.

    Args:
        order: the order with the steps.
        bundle: the order's bundle.
        signature: the bundle's signature.
        model: the bundle's model.
        teachers: the teachers of the distillation steps.
        assumption: what is assumed about the results of pruning steps.

    Raises:
        CompressionError: no step fits, or a step of preset ``custom`` cannot be applied.
    """

    def dry_run_step(step: AnyStep, source: Model) -> Model | NotApplicable:
        splits = _build_splits_without_data(parts_of_step(step, bundle), bundle)
        bench = Bench(signature=signature, teachers=teachers, **splits)
        try:
            return dry_run(step, source, bench, smallest=assumption == "smallest")
        except NothingToCompress as fault:
            return not_applicable(fault)
        except CompressionError as fault:
            if order.preset == "custom":
                raise
            return not_applicable(fault)

    def budget_violation(_: Model) -> Reason | None:
        return Reason("not_within_budget") if assumption == "over_budget" else None

    check = budget_violation if has_measurable_budget(order, bundle) else None
    return RecipeDryRun(*select_steps(order, bundle, model, dry_run_step, check))


def weight_byte_bounds(
    order: Order,
    bundle: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
) -> tuple[int, int]:
    """Return the fewest and the most bytes of weights that a recipe can result in.

    The arguments are those of ``dry_run_recipe``.
    """
    # One dry run is enough if the bytes do not depend on data: no budget is measured on validation
    # rows, and no step prunes a number of rows that depends on the training rows
    # (``requires_budget``).
    is_uncertain = has_measurable_budget(order, bundle) or any(
        step.requires_budget for step in order.recipe()
    )
    assumptions: tuple[Assumption, ...] = (
        ("smallest", "over_budget") if is_uncertain else ("largest",)
    )
    sizes = []
    for assumption in assumptions:
        try:
            stages, _ = dry_run_recipe(order, bundle, signature, model, teachers, assumption)
            sizes.append(stored_bytes(stages[-1][1].module))
        except CompressionError:  # under this assumption no step fits: the model is unchanged
            sizes.append(stored_bytes(model.module))
    return min(sizes), max(sizes)


def min_weight_bytes(order: Order, bundle: BundleRef) -> int:
    """Load a bundle and return the fewest bytes of weights that a recipe can result in."""
    loaded = load_bundle(bundle.artifact)
    return weight_byte_bounds(order, bundle, loaded.manifest.signature, loaded.model, ())[0]


def _build_splits_without_data(parts: tuple[Part, ...], bundle: BundleRef) -> dict[str, Split]:
    """Return splits with the row counts that a step would read, but with no data."""
    return {
        part: Split(path="", sha256="0" * 64, rows=bundle.rows[split_name(part, bundle)])
        for part in parts
    }
