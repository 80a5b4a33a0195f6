"""The parameter of the flow: an order for one model, with preset, targets and limits."""

import shlex
from typing import Any, Self

from pydantic import ConfigDict, Field, model_validator

from compressors.contracts import Limit, default_target
from compressors.contracts.value_errors import value_error
from compressors.core.registries import AnyStep
from flows.order_schema import add_rules
from flows.presets import PRESETS, Group, PresetOptions
from flows.terms import Targets, Terms
from infra.data.checks import Rules
from tasks.orchestration.documents import ORDER_FILE, Reproduction


class Order(Terms):
    """Compress one model, judge what will be served, and register the result."""

    model_config = ConfigDict(json_schema_extra=add_rules)

    steps: tuple[AnyStep, ...] = Field(
        (),
        title="Steps",
        description="Only with preset 'custom': the recipe, in order.",
        json_schema_extra={"position": 4},
    )

    @model_validator(mode="after")
    def _steps_fit_the_preset(self) -> Self:
        if (self.preset == "custom") != bool(self.steps):
            raise (
                value_error("steps_with_preset", preset=self.preset)
                if self.steps
                else value_error("steps_missing")
            )
        return self

    @model_validator(mode="after")
    def _a_map_fits_what_is_served(self) -> Self:
        for step, following in zip(self.steps, self.steps[1:], strict=False):
            if step.effect == "output":
                raise value_error("recalibrate_not_last", step=following.kind)
        return self

    def recipe(self) -> tuple[AnyStep, ...]:
        """Return the steps that may run, those of every option, in order."""
        return tuple(step for group in self.groups() for step in group)

    def groups(self) -> tuple[Group, ...]:
        """Return the steps in groups that are applied completely or not at all."""
        return tuple(option for choice in self.choices() for option in choice.options)

    def choices(self) -> tuple[PresetOptions, ...]:
        """Return the steps in choices; the first option that fits model and budget is applied.

        A preset has several options and groups of steps. With a budget, a custom recipe also has
        groups: a cut, and the training that recovers its quality.
        """
        if self.preset != "custom":
            return PRESETS[self.preset]
        groups: list[Group] = []
        for step in self.steps:
            if groups and self.budget is not None and step.recovers_quality:
                groups[-1] = (*groups[-1], step)
            else:
                groups.append((step,))
        return tuple(PresetOptions((group,)) for group in groups)

    def own_steps(self) -> list[dict[str, Any]]:
        """Return the steps of preset ``custom`` as plain values; none for the other presets."""
        return [step.model_dump(mode="json") for step in self.steps]

    def reproduction(self, model: str, teachers: tuple[str, ...] = ()) -> Reproduction:
        """Return how to reproduce the result: a command, and the order as file contents.

        Fields that do not change the result (promotion, attempt) are omitted, so that orders that
        differ only in them have the same report.

        Args:
            model: the bundle that the order resolved to, name@version.
            teachers: the URIs of the bundles that its teachers resolved to.
        """
        said = {"model": model, "teachers": teachers, "promote": False, "attempt": 0}
        same = self.model_copy(update=said)
        return Reproduction(command=_command(same), order=same.model_dump(mode="json"))


def _command(order: Order) -> str:
    """Return the command for this order, with options if they can express it completely."""
    wanted = order.targets.wanted()
    required = [target for target, how in wanted.items() if how == "required"]
    if order.preset == "custom" or not _has_only_options(order):
        return f"recpress compress --order {ORDER_FILE}"
    options = [("--preset", str(order.preset))]
    options += [("--limit", str(limit)) for limit in order.limits]
    options += [("--target", str(target)) for target in required]
    options += [("--optional", str(target)) for target in wanted if target not in required]
    if order.budget is not None:
        options.append(("--budget", f"{order.budget:g}"))
    options += [("--teacher", teacher) for teacher in order.teachers]
    if order.seed:
        options.append(("--seed", str(order.seed)))
    parts = [f"recpress compress {shlex.quote(order.model)}"]
    parts += [f"{name} {shlex.quote(value)}" for name, value in options]
    return " \\\n    ".join(parts)


def _has_only_options(order: Order) -> bool:
    """Return whether all other fields are defaults and limits read back unchanged."""
    others = Targets.model_fields
    return (
        order.rules == Rules()
        and default_target().name in order.targets.wanted()  # with options it is always a target
        and all(getattr(order.targets, name) == others[name].default for name in others)
        and all(Limit.parse(str(limit)) == limit for limit in order.limits)
    )
