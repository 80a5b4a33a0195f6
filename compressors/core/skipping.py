"""Run a step on the units that support it, and skip the others with their reasons.

A unit may not support a step: forward code reads its weight instead of calling it, or the network
reads its attributes and gives other scores. Such a unit is excluded from the step, and its plan
line gives the reason. If the recipe names the unit exactly (without a wildcard), the reason is
raised as an error instead.

Such units are detected in two ways. Before the step, every unit to be replaced is replaced by a
module without weights, and the network runs once (``unreplaceable``). After a failure whose unit is
not known, a bisection runs the step on halves of its units (``_search``). Steps that train are
not searched, because each attempt would train again.
"""

import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Bench, is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.core.batches import example
from compressors.core.model import Model
from compressors.core.runner import Planned, as_refusal, plan_step, rows_of_tables, run
from compressors.core.steps.decisions import EXCEPT, is_named
from compressors.core.steps.step import Method
from compressors.core.units import Unit, swap
from compressors.errors.compression import CompressionError, ModelRefused, NothingToCompress
from compressors.errors.steps import StepRefused

PROBE_ROWS = 8


def run_or_skip(
    method: Method,
    source: Model,
    bench: Bench,
    folder: Path,
    excluded: Mapping[str, Reason] = MappingProxyType({}),
) -> Model:
    """Run a step (``compressors.core.runner.run``) without the units that do not support it.

    Args:
        method: the method and its settings.
        source: the model to compress; not modified.
        bench: the data that the step may use.
        folder: where the tensors are written; the returned module maps them.
        excluded: units that the step may not change, with the reasons.

    Raises:
        NothingToCompress: no unit is left.
        CompressionError: as ``run``, if no single unit is the cause, or the recipe names the unit
            that is.
    """
    present = {unit.name for unit in Unit.of(source.module)}
    skipped = {name: why for name, why in excluded.items() if name in present}
    planned: Planned | None = None
    with suppress(CompressionError), as_refusal(method):  # run raises the same with its context
        planned = plan_step(method, source.private(), bench)
    if planned is not None:
        skipped = {name: why for name, why in skipped.items() if planned.plan.selects(name)}
        skipped |= skippable(planned, method, source, bench)
    if skipped:
        planned = None  # another plan: without these units
    try:
        return run(method, source, bench, folder, skipped=skipped, planned=planned)
    except (NothingToCompress, ModelRefused):
        raise
    except CompressionError as fault:
        failing = _failing_units(method, source, bench, skipped)
        if not failing:
            raise
        _require_unnamed(method, failing, source, fault)
        return run(method, source, bench, folder, skipped={**skipped, **failing})


def skippable(planned: Planned, method: Method, source: Model, bench: Bench) -> dict[str, Reason]:
    """Return the planned units that a step cannot change, known before it runs, with the reasons.

    Args:
        planned: the plan without these exceptions.
        method: the method and its settings.
        source: a loaded model, or one of placeholders; not modified.
        bench: only its signature is used.

    Raises:
        CompressionError: the recipe names such a unit.
    """
    if planned.step.effect not in ("format", "parts"):
        return {}
    selected = [name for name, decision in planned.plan.decisions.items() if decision.selected]
    units = unreplaceable(source, bench, selected)
    _require_unnamed(method, units, source, None)
    return units


def unreplaceable(source: Model, bench: Bench, names: Collection[str]) -> dict[str, Reason]:
    """Return the units whose modules cannot be replaced, with the reasons.

    Args:
        source: the network; not modified.
        bench: its signature defines the inputs of the network.
        names: names of the units to check.
    """
    inputs = example(bench.signature, rows_of_tables(source.module, bench.signature), PROBE_ROWS)
    try:
        expected = _scores(source.module, inputs)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        return {}  # the network itself fails: run says whose fault that is
    if not names or _why_not(source, names, inputs, expected) is None:
        return {}
    reasons = {name: _why_not(source, [name], inputs, expected) for name in names}
    return {name: why for name, why in reasons.items() if why is not None}


class _WithoutWeights(nn.Module):
    """Calls a unit's module but exposes no weight, like a compressed module."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.__dict__["_unit"] = unit.module  # not a submodule, so that its weights are hidden
        if isinstance(unit.module, nn.Linear):
            self.in_features = unit.module.in_features
            self.out_features = unit.module.out_features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_unit"](*args, **kwargs)


def _why_not(
    source: Model, names: Collection[str], inputs: Mapping[str, Tensor], expected: Tensor
) -> Reason | None:
    """Return why a network gives other scores when units expose no weights, or None."""
    module = source.private().module
    for unit in Unit.of(module):
        if unit.name in names:
            swap(module, unit.name, _WithoutWeights(unit))
    try:
        scores = _scores(module, inputs)
    except Exception as fault:  # the network's code may raise any exception
        if is_out_of_memory(fault):
            raise
        said = (str(fault).strip().splitlines() or [repr(fault)])[0].rstrip(".")
        said = said.replace("'_WithoutWeights' object", "a compressed module")
        return Reason("weight_read", error=type(fault).__name__, message=said)
    if scores.shape != expected.shape or not torch.equal(scores, expected):
        return Reason("attributes_read")
    return None


@torch.no_grad()
def _scores(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    scores: Tensor = module(**{name: tensor.clone() for name, tensor in inputs.items()})
    return torch.nan_to_num(scores)


def _failing_units(
    method: Method, source: Model, bench: Bench, skipped: Mapping[str, Reason]
) -> dict[str, Reason]:
    """Return the units on which the step fails alone, with the reasons; none if it trains."""
    if method.trains or not any(hasattr(method, field) for field in ("tables", "layers")):
        return {}
    names = [unit.name for unit in Unit.of(source.module) if unit.name not in skipped]
    with suppress(CompressionError):  # it fails while it plans: any unit may be the cause
        planned = plan_step(method, source.private(), bench, skipped)
        names = [name for name in names if planned.plan.selects(name)]
    return _search(method, source, bench, skipped, names)


def _search(
    method: Method, source: Model, bench: Bench, skipped: Mapping[str, Reason], names: list[str]
) -> dict[str, Reason]:
    if not names:
        return {}
    tried, units = set(names), Unit.of(source.module)
    others = {unit.name: Reason("not_tried") for unit in units if unit.name not in tried}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(method, source, bench, Path(scratch) / "tried", skipped={**others, **skipped})
        except NothingToCompress:
            return {}
        except CompressionError as fault:
            if len(names) == 1:
                return {names[0]: Reason("step_failed", fault=_sentence(fault))}
        else:
            return {}
    middle = len(names) // 2
    return {
        **_search(method, source, bench, skipped, names[:middle]),
        **_search(method, source, bench, skipped, names[middle:]),
    }


def _sentence(fault: Exception) -> str:
    return " ".join(str(fault).split()).rstrip(".")


def _require_unnamed(
    method: Method, failing: Mapping[str, Reason], source: Model, fault: Exception | None
) -> None:
    """Raise if the recipe names one of some units exactly.

    Raises:
        CompressionError: it does.
    """
    patterns = (*getattr(method, "tables", ()), *getattr(method, "layers", ()))
    exact = [p for p in patterns if not p.startswith(EXCEPT) and not set(p) & set("*?[")]
    units = {unit.name: unit for unit in Unit.of(source.module)}
    for name, why in failing.items():
        if name in units and any(is_named(units[name], pattern) for pattern in exact):
            raise StepRefused(
                "unit_not_changeable", step=method.kind, unit=name, reason=why
            ) from fault
