"""``Order``: the parameter of the flow, which is also the form in Prefect's UI.

The recipe of an order is a list of choices; a choice has one or more options, and an option
(``Group``) is a group of steps (``flows/presets.py``).
"""

import shlex
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from compressors.contracts import Limit, default_target
from compressors.contracts.value_errors import value_error
from compressors.core.registries import AnyStep
from flows.order_schema import add_rules
from flows.presets import PRESETS, Choice, Group
from flows.terms import Targets, Terms
from infra.data.checks import Rules
from tasks.orchestration.documents import ORDER_FILE, Reproduction


class Order(Terms):
    """Compress a model, compare the result with the limits for each target, and register it."""

    model_config = ConfigDict(json_schema_extra=add_rules)

    steps: tuple[AnyStep, ...] = Field(
        (),
        title="Steps",
        description="Only with preset 'custom': the recipe, in order.",
        json_schema_extra={"position": 4},  # of the field in the form
    )

    @model_validator(mode="after")
    def _require_steps_only_for_custom(self) -> Self:
        if (self.preset == "custom") != bool(self.steps):
            raise (
                value_error("steps_with_preset", preset=self.preset)
                if self.steps
                else value_error("steps_missing")
            )
        return self

    @model_validator(mode="after")
    def _require_output_calibration_last(self) -> Self:
        # A step with the effect "output" changes the model's scores, not a unit: 'recalibrate'.
        for step, following in zip(self.steps, self.steps[1:], strict=False):
            if step.effect == "output":
                raise value_error("recalibrate_not_last", step=following.kind)
        return self

    def recipe(self) -> tuple[AnyStep, ...]:
        """Return the steps of every option of every choice, in order."""
        return tuple(step for group in self.groups() for step in group)

    def groups(self) -> tuple[Group, ...]:
        """Return all options of all choices; an option is a group of steps."""
        return tuple(option for choice in self.choices() for option in choice.options)

    def choices(self) -> tuple[Choice, ...]:
        """Return the recipe as choices, each a list of options (``flows/presets.py``).

        A choice of a custom recipe has one option. That option is one step; with a budget, it also
        includes the steps that follow it and recover its quality.
        """
        if self.preset != "custom":
            return PRESETS[self.preset]
        groups: list[Group] = []
        for step in self.steps:
            if groups and self.budget is not None and step.recovers_quality:
                groups[-1] = (*groups[-1], step)
            else:
                groups.append((step,))
        return tuple(Choice((group,)) for group in groups)

    def custom_steps(self) -> list[dict[str, Any]]:
        """Return the steps of preset ``custom`` as plain values; none for the other presets."""
        return [step.model_dump(mode="json") for step in self.steps]

    def reproduction(self, model: str, teachers: tuple[str, ...] = ()) -> Reproduction:
        """Return how to reproduce the result: a command, and the contents of an order file.

        In both, ``promote`` and ``attempt`` (a number that users increase to run an order again)
        have their defaults, since they do not affect the result. Orders that differ only in these
        fields therefore have the same report.

        Args:
            model: the order's bundle as name@version.
            teachers: URIs of the teachers' bundles.
        """
        fields = {"model": model, "teachers": teachers, "promote": False, "attempt": 0}
        order = self.model_copy(update=fields)
        return Reproduction(command=_build_command(order), order=order.model_dump(mode="json"))


def _build_command(order: Order) -> str:
    """Return the command for an order: with options if they can express it, else with a file."""
    requirements = order.targets.requirements()
    required = [target for target, value in requirements.items() if value == "required"]
    if order.preset == "custom" or not _has_only_options(order):
        return f"recpress compress --order {ORDER_FILE}"
    options = [("--preset", str(order.preset))]
    options += [("--limit", str(limit)) for limit in order.limits]
    options += [("--target", str(target)) for target in required]
    options += [("--optional", str(target)) for target in requirements if target not in required]
    if order.budget is not None:
        options.append(("--budget", f"{order.budget:g}"))
    options += [("--teacher", teacher) for teacher in order.teachers]
    if order.seed:
        options.append(("--seed", str(order.seed)))
    parts = [f"recpress compress {shlex.quote(order.model)}"]
    parts += [f"{name} {shlex.quote(value)}" for name, value in options]
    return " \\\n    ".join(parts)


def _has_only_options(order: Order) -> bool:
    """Return whether options of the command can express the fields of an order except steps.

    Fields without an option must have their defaults, and each limit must be the same after it is
    written as text and read again.
    """
    target_settings = Targets.model_fields
    return (
        order.rules == Rules()  # requirements on the data beyond its signature
        and default_target().name in order.targets.requirements()  # options always include it
        and all(
            getattr(order.targets, name) == field.default for name, field in target_settings.items()
        )
        and all(Limit.parse(str(limit)) == limit for limit in order.limits)
    )
