"""Run a step on the units that support it, and skip the others with their reasons.

A unit is a table or dense layer. Some units do not support a step (one line of a recipe), because
the network's forward code reads a layer's weight instead of calling it, multiplies by the weight of
a table whose new format cannot multiply, or reads attributes and gives other scores. Such a unit is
excluded from the step, and its plan line gives the reason. If the recipe names the unit exactly
(without a wildcard), the reason is raised as an error instead.

Such units are detected in two ways. Before the step runs, the network runs on generated inputs with
other modules in place of the units that the step would replace (``probe_units``). These modules
expose only what compressed ones do: a layer has no weight, and reads of a table's weight are
reported. If the step still fails, a bisection finds the units that cause it: the step runs on each
half of its units, down to single units (``_find_failing_half``). Steps that train are not bisected,
because each attempt would train again.
"""

import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compressors.contracts import Bench, Signature, is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import Bag
from compressors.core.modules.observed_table import ObservedTable, Read
from compressors.core.modules.table_weight import can_multiply
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import (
    PlannedStep,
    network_errors_as_refusals,
    plan_step,
    rows_of_tables,
    run,
)
from compressors.core.scores import network_scores
from compressors.core.steps.decisions import EXCEPT, is_named
from compressors.core.steps.step import Method
from compressors.core.units import Unit, swap
from compressors.errors.compression import CompressionError, ModelRefused, NothingToCompress
from compressors.errors.steps import StepRefused

PROBE_ROWS = 8
"""Generated rows on which the network runs to detect units that cannot be replaced."""


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
        folder: where the tensors are written; the returned module memory-maps these files.
        excluded: by unit name, why the step must not change the unit. Other names are ignored.

    Raises:
        NothingToCompress: no unit is left to compress.
        StepRefused: the recipe names a unit that does not support the step.
        CompressionError: the error of ``run``, if no unit is its cause.
    """
    present = {unit.name for unit in Unit.of(source.module)}
    skipped = {name: why for name, why in excluded.items() if name in present}
    planned: PlannedStep | None = None
    notes: Mapping[str, tuple[Reason, ...]] = {}
    # Errors are suppressed here because run plans again and raises them.
    with suppress(CompressionError), network_errors_as_refusals(method):
        planned = plan_step(method, source.private(), bench)
    if planned is not None:
        skipped = {name: why for name, why in skipped.items() if planned.plan.selects(name)}
        findings = find_skippable_units(planned, method, source, bench)
        skipped, notes = {**skipped, **findings.skipped}, findings.notes
    if skipped:
        planned = None  # the plan includes these units, so run plans again without them
    try:
        return run(method, source, bench, folder, skipped=skipped, planned=planned, notes=notes)
    except (NothingToCompress, ModelRefused):
        raise
    except CompressionError as fault:
        failing = _find_failing_units(method, source, bench, skipped)
        if not failing:
            raise
        _require_unnamed(method, failing, source, fault)
        return run(method, source, bench, folder, skipped={**skipped, **failing}, notes=notes)


class Findings(NamedTuple):
    """The result of ``probe_units``: units that cannot be replaced, and reads of other weights.

    Attributes:
        skipped: by unit name, why the step cannot replace the unit.
        notes: how forward code reads the weight of each other table, by the table's name.
    """

    skipped: dict[str, Reason]
    notes: dict[str, tuple[Reason, ...]]


def find_skippable_units(
    planned: PlannedStep, method: Method, source: Model, bench: Bench
) -> Findings:
    """Find selected units that the step cannot replace, and how forward code reads other weights.

    The step does not run. Only steps that replace units (effect ``format`` or ``parts``) are
    checked; for others the result is empty.

    Args:
        planned: the step's plan for ``source``.
        method: the method and its settings.
        source: a loaded model, or one of placeholders; not modified.
        bench: only its signature is used.

    Raises:
        StepRefused: the recipe names a unit that the step cannot replace.
    """
    if planned.step.effect not in ("format", "parts"):
        return Findings({}, {})
    selected = [name for name, decision in planned.plan.decisions.items() if decision.selected]
    findings = probe_units(source, bench, selected)
    multiplied = [name for name, notes in findings.notes.items() if _MULTIPLIED in notes]
    if multiplied:
        result = planned.step.dry_run(source.private(), planned.plan).module
        for unit in Unit.of(result):
            table = unit.module.table if isinstance(unit.module, Bag) else unit.module
            if unit.name not in multiplied:
                continue
            # The dry run of a step that predicts no shapes leaves the table unchanged.
            is_replaced = not isinstance(table, nn.Embedding | nn.EmbeddingBag)
            if not (is_replaced and can_multiply(table)):
                storage = unit.format if is_replaced else planned.step.kind
                findings.skipped[unit.name] = Reason("not_multiplied", format=storage)
                del findings.notes[unit.name]
    _require_unnamed(method, findings.skipped, source, None)
    return findings


def probe_units(source: Model, bench: Bench, names: Collection[str]) -> Findings:
    """Run the network with units replaced by modules that expose only what compressed ones do.

    If the network itself fails on generated inputs, the result is empty.

    Args:
        source: the model; not modified.
        bench: its signature defines the inputs of the network.
        names: names of the units to check.
    """
    inputs = generate_inputs(
        bench.signature, rows_of_tables(source.module, bench.signature), PROBE_ROWS
    )
    try:
        expected = _compute_scores(source.module, inputs, bench.signature)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        return Findings({}, {})  # run raises the error of the network
    notes: dict[str, tuple[Reason, ...]] = {}

    def why_not_replaceable(units: Collection[str]) -> Reason | None:
        why, reads = _probe(source, units, inputs, expected, bench.signature)
        if why is None:
            notes.update(reads)
        return why

    if not names or why_not_replaceable(names) is None:
        return Findings({}, notes)
    reasons = {name: why_not_replaceable([name]) for name in names}
    return Findings({name: why for name, why in reasons.items() if why is not None}, notes)


class _WithoutWeights(nn.Module):
    """Calls a dense layer but exposes no weight, like a compressed layer."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.__dict__["_unit"] = unit.module  # not a submodule, so that its weights are hidden
        if isinstance(unit.module, nn.Linear):
            self.in_features = unit.module.in_features
            self.out_features = unit.module.out_features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_unit"](*args, **kwargs)


_MULTIPLIED = Reason("weight_multiplied")
_NOTES: dict[Read, Reason] = {
    "looked_up": Reason("rows_read"),
    "multiplied": _MULTIPLIED,
    "decoded": Reason("weight_decoded"),
}
"""The note of a plan line for each kind of read of a table's weight."""

ROUNDING = 1e-4
"""Largest difference of scores, relative to the largest score, that counts as equal.

It is allowed only if the weight of a table is read: the order of additions in a matmul with a bias
may change. Otherwise scores must be equal.
"""


def _probe(
    source: Model,
    names: Collection[str],
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    signature: Signature,
) -> tuple[Reason | None, dict[str, tuple[Reason, ...]]]:
    """Return why these units cannot be replaced, or None; and notes of reads of table weights.

    They cannot if the network with the replacements fails or gives other scores.
    """
    module = source.private().module
    reads: dict[str, list[Read]] = {}
    for unit in Unit.of(module):
        if unit.name in names:
            swap(module, unit.name, _probe_module(unit, reads.setdefault(unit.name, [])))
    try:
        scores = _compute_scores(module, inputs, signature)
    except Exception as fault:  # the network's code may raise any exception
        if is_out_of_memory(fault):
            raise
        message = (str(fault).strip().splitlines() or [repr(fault)])[0].rstrip(".")
        for probe in (_WithoutWeights, ObservedTable):
            message = message.replace(f"'{probe.__name__}' object", "a compressed module")
        return Reason("weight_read", error=type(fault).__name__, message=message), {}
    notes = {
        name: tuple(_NOTES[read] for read in _NOTES if read in kinds)
        for name, kinds in reads.items()
        if kinds
    }
    largest = ROUNDING * float(expected.abs().max()) if notes and expected.numel() else 0.0
    if scores.shape != expected.shape or bool(((scores - expected).abs() > largest).any()):
        return Reason("attributes_read"), {}
    return None, notes


def _probe_module(unit: Unit, reads: list[Read]) -> nn.Module:
    """Return a module that exposes what a compressed module would; reads are appended to a list."""
    if unit.role == "dense":
        return _WithoutWeights(unit)

    def observe(read: Read, _: Tensor | None) -> None:
        reads.append(read)

    return ObservedTable(unit.module, observe, hides_attributes=True)


@torch.no_grad()
def _compute_scores(
    module: nn.Module, inputs: Mapping[str, Tensor], signature: Signature
) -> Tensor:
    """Return the scores of a network with NaN replaced by 0, so that equal scores compare equal."""
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    scores = network_scores(module, copies, signature)
    return torch.nan_to_num(scores)


def _find_failing_units(
    method: Method, source: Model, bench: Bench, skipped: Mapping[str, Reason]
) -> dict[str, Reason]:
    """Return the units on which the step fails, by name, with the reasons.

    The result is empty if the step trains, or if it has no name patterns to exclude units.
    """
    if method.trains or not any(hasattr(method, field) for field in ("tables", "layers")):
        return {}
    names = [unit.name for unit in Unit.of(source.module) if unit.name not in skipped]
    with suppress(CompressionError):  # if planning fails, any unit may be the cause
        planned = plan_step(method, source.private(), bench, skipped)
        names = [name for name in names if planned.plan.selects(name)]
    return _find_failing_half(method, source, bench, skipped, names)


def _find_failing_half(
    method: Method, source: Model, bench: Bench, skipped: Mapping[str, Reason], names: list[str]
) -> dict[str, Reason]:
    """Run the step on these units only; if it fails, on each half, down to single units."""
    if not names:
        return {}
    attempted, units = set(names), Unit.of(source.module)
    others = {unit.name: Reason("not_tried") for unit in units if unit.name not in attempted}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(method, source, bench, Path(scratch) / "attempt", skipped={**others, **skipped})
        except NothingToCompress:
            return {}
        except CompressionError as fault:
            if len(names) == 1:
                return {names[0]: Reason("step_failed", fault=_join_lines(fault))}
        else:
            return {}
    middle = len(names) // 2
    return {
        **_find_failing_half(method, source, bench, skipped, names[:middle]),
        **_find_failing_half(method, source, bench, skipped, names[middle:]),
    }


def _join_lines(fault: Exception) -> str:
    return " ".join(str(fault).split()).rstrip(".")


def _require_unnamed(
    method: Method, failing: Mapping[str, Reason], source: Model, fault: Exception | None
) -> None:
    """Raise if the recipe names one of the failing units exactly, without a wildcard.

    Raises:
        StepRefused: gives the unit and the reason why it cannot be changed.
    """
    patterns = (*getattr(method, "tables", ()), *getattr(method, "layers", ()))
    exact = [p for p in patterns if not p.startswith(EXCEPT) and not set(p) & set("*?[")]
    units = {unit.name: unit for unit in Unit.of(source.module)}
    for name, why in failing.items():
        if name in units and any(is_named(units[name], pattern) for pattern in exact):
            raise StepRefused(
                "unit_not_changeable", step=method.kind, unit=name, reason=why
            ) from fault
