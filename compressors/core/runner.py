"""Run a compression step and check its contract.

A *unit* is a table or dense layer of a network. A *method* (``Method``) is the settings of one
compression algorithm, a line of a recipe. It is one of two kinds: a *step* (``Step``) plans and
changes the whole network; a *table step* (``TableStep``) only encodes rows of a table, and
``to_step`` converts it to a step.

``plan_step`` decides which units a step changes. ``run`` plans and applies the step, and raises
``ContractBroken`` if the step does not follow its plan. A *part* of the bench is one of its splits,
such as ``train``.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from compressors.contracts import (
    Bench,
    Frozen,
    Network,
    Part,
    Signature,
    all_tables,
    is_out_of_memory,
    required_parts,
)
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.outcomes import resolve_decisions
from compressors.core.plan_lines import add_remarks, build_plan, output_lines
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import network_scores
from compressors.core.state.module_state import build_records, load, save
from compressors.core.steps.decisions import EXCEPT, Decision, StepPlan
from compressors.core.steps.step import Method, Step
from compressors.core.steps.table_step import to_step
from compressors.core.units import Unit, folded_norms, stored_bytes, table_rows
from compressors.errors.compression import ContractBroken, ModelRefused, NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.quantize.calibration.input_ranges import input_range_warnings

CHECK_ROWS = 32
"""Generated rows on which the stored model must give the same scores as the model in memory."""

NETWORK_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that a network's code typically raises if it does not support a step's changes."""


class PlannedStep(NamedTuple):
    """A step and its plan for one model, with a decision for every unit.

    Attributes:
        step: the step; its settings ``tables`` and ``layers`` (name patterns) exclude the skipped
            units.
        plan: the step's plan, with a decision for every unit of the model.
        skipped: by unit name, why the step must not change the unit.
    """

    step: Step
    plan: StepPlan[Any]
    skipped: Mapping[str, Reason]


def plan_step(
    method: Method,
    model: Model,
    bench: Bench,
    skipped: Mapping[str, Reason] = MappingProxyType({}),
) -> PlannedStep:
    """Plan a step, and add a decision for each unit that its plan does not mention.

    Args:
        method: the method and its settings.
        model: the model whose units are considered.
        bench: the data that the step may use.
        skipped: by unit name, why the step must not change the unit.

    Raises:
        NothingToCompress: the step changes no unit.
        CompressionError: the step cannot be applied to this model.
    """
    step, units = to_step(exclude_units(method, skipped)), Unit.of(model.module)
    plan = step.plan(model, bench)
    decisions = dict(plan.decisions)
    decisions |= {
        unit.name: Decision("skipped", (Reason("skipped", step=step.kind, why=skipped[unit.name]),))
        for unit in units
        if unit.name in skipped
    }
    if not decisions:
        raise NothingToCompress("units_absent", step=step.kind)
    if not any(decision.selected for decision in decisions.values()):
        raise NothingToCompress(
            "units_missing",
            step=step.kind,
            reasons={name: decision.reasons for name, decision in decisions.items()},
        )
    defaults = {
        unit.name: Decision("skipped", (Reason("wrong_role", step=step.kind, role=unit.role),))
        for unit in units
    }
    return PlannedStep(step, StepPlan({**defaults, **decisions}, plan.payload), skipped)


def add_notes(plan: StepPlan[Any], notes: Mapping[str, tuple[Reason, ...]]) -> StepPlan[Any]:
    """Return a plan with additional reasons, by unit name, in the decisions of selected units."""
    decisions = {
        name: decision.replace_reasons(*decision.reasons, *notes.get(name, ()))
        for name, decision in plan.decisions.items()
    }
    return replace(plan, decisions=decisions)


def exclude_units(method: Method, names: Collection[str]) -> Method:
    """Return a copy of the method whose name patterns (``tables``, ``layers``) exclude these units.

    Returns the method unchanged if ``names`` is empty or the method has no name patterns.
    """
    update = {
        field: (*getattr(method, field), *(EXCEPT + name for name in names))
        for field in ("tables", "layers")
        if names and hasattr(method, field)
    }
    return method.model_copy(update=update) if isinstance(method, Frozen) and update else method


def run(
    method: Method,
    source: Model,
    bench: Bench,
    folder: Path,
    *,
    skipped: Mapping[str, Reason] = MappingProxyType({}),
    planned: PlannedStep | None = None,
    notes: Mapping[str, tuple[Reason, ...]] = MappingProxyType({}),
) -> Model:
    """Apply one step, write the result to ``folder``, and return the model loaded from there.

    Args:
        method: the method and its settings.
        source: the model to compress; not modified.
        bench: the data that the step may use.
        folder: where the tensors are written; the returned module memory-maps these files.
        skipped: by unit name, why the step must not change the unit. Ignored if ``planned``, which
            contains these reasons too, is given.
        planned: the result of ``plan_step`` for this model and bench; if None, ``run`` plans.
        notes: by unit name, reasons that are added to the unit's plan line if it is selected.

    Raises:
        NothingToCompress: the step can compress no unit of this model, the bench lacks a part that
            the step needs, or an input names a table that the result does not have.
        ContractBroken: the step modified ``source``, did not follow its plan, or made finite scores
            infinite or NaN; or the stored result gives other scores than the one in memory.
        ModelRefused: the source network fails on generated inputs that its signature allows, or
            gives scores that are not finite.
        CompressionError: the step cannot be applied to this model (``StepRefused`` if the network's
            code fails).
    """
    _require_parts(method, bench)
    versions = _read_tensor_versions(source.module)
    model = source.private()
    with network_errors_as_refusals(method):
        step, plan, skipped = planned or plan_step(method, model, bench, skipped)
        plan = add_notes(plan, notes)
        model, outcomes = step.apply(model, bench, plan)
    module = model.module.eval()
    if _read_tensor_versions(source.module) != versions:
        raise ContractBroken("source_changed", step=step.kind)
    before, after = Unit.of(source.module), Unit.of(module)
    decisions = resolve_decisions(step.kind, step.effect, plan.decisions, outcomes, before, after)
    inputs = generate_inputs(bench.signature, rows_of_tables(module, bench.signature), CHECK_ROWS)
    expected = _compute_scores(step, source, module, inputs, bench.signature)
    if not bool(torch.isfinite(expected).all()):
        _require_finite_source(step, source, inputs, bench.signature)
        raise ContractBroken("scores_not_finite", step=step.kind)
    ties = save(module, folder, files=source.files)
    network = Network(
        architecture=model.network.architecture, modules=build_records(module), ties=ties
    )
    loaded = load(source.architecture, network, folder)
    with torch.no_grad():
        loaded_scores = network_scores(loaded, inputs, bench.signature)
    if not torch.equal(loaded_scores, expected):
        difference = float((loaded_scores - expected).abs().max())
        raise ContractBroken("stored_scores_differ", step=step.kind, gap=difference)
    sizes = stored_bytes(source.module), stored_bytes(loaded)
    outputs = output_lines(step.kind, source, module, decisions)
    warnings = input_range_warnings(source.module, loaded, bench)
    folded = folded_norms(loaded)
    new_plan = build_plan(
        step.kind,
        source,
        decisions,
        before,
        after,
        sizes,
        outputs=outputs,
        folded=folded,
        warnings=warnings,
    )
    outcome_reasons = {name: outcome.reasons for name, outcome in outcomes.items()}
    new_plan = add_remarks(new_plan, step.kind, skipped, decisions, outcome_reasons)
    return Model(loaded, source.architecture, network, new_plan)


@contextmanager
def network_errors_as_refusals(step: Method) -> Iterator[None]:
    """Convert ``NETWORK_ERRORS`` inside the context to ``StepRefused``; other errors pass through.

    An out-of-memory error passes through too, because the network's code is not its cause.

    Raises:
        StepRefused: names the step and the original exception.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except NETWORK_ERRORS as fault:
        raise StepRefused("network_not_changeable", step=step.kind, problem=repr(fault)) from fault


def _require_parts(step: Method, bench: Bench) -> None:
    """Raise ``NothingToCompress`` if the bench lacks a part that the step needs."""
    needs = required_parts(step.needs, scores_rows=bench.signature.scores_rows)
    missing = [part for part in needs if getattr(bench, part) is None]
    if missing:
        present = [part for part in get_args(Part) if getattr(bench, part) is not None]
        raise NothingToCompress(
            "rows_missing", step=step.kind, missing=tuple(missing), present=tuple(present)
        )


def _compute_scores(
    step: Method,
    source: Model,
    module: nn.Module,
    inputs: dict[str, Tensor],
    signature: Signature,
) -> Tensor:
    """Return a module's scores; if it fails, run the source to decide which error to raise.

    Args:
        step: the step, for the message.
        source: the model before the step.
        module: the network after the step, or a copy of the source's.
        inputs: generated inputs.
        signature: the signature of both.

    Raises:
        ModelRefused: the source network fails as well.
        StepRefused: only ``module`` fails.
    """
    try:
        with torch.no_grad():
            scores = network_scores(module, inputs, signature)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        try:
            with torch.no_grad():
                network_scores(source.private().module, inputs, signature)
        except Exception as source_fault:
            if is_out_of_memory(source_fault):
                raise
            raise ModelRefused(
                "network_fails",
                architecture=source.network.architecture.path,
                problem=repr(source_fault),
            ) from source_fault
        raise StepRefused("network_fails", step=step.kind, problem=repr(fault)) from fault
    return scores


def _require_finite_source(
    step: Method, source: Model, inputs: dict[str, Tensor], signature: Signature
) -> None:
    """Raise if the source model gives scores that are not finite: then the step is not the cause.

    Raises:
        ModelRefused: some rows have a NaN or infinite score, or the source network fails.
    """
    scores = _compute_scores(step, source, source.private().module, inputs, signature)
    nonfinite_rows = int((~torch.isfinite(scores)).reshape(len(scores), -1).any(dim=1).sum())
    if nonfinite_rows:
        raise ModelRefused(
            "scores_not_finite",
            architecture=source.network.architecture.path,
            count=nonfinite_rows,
            rows=len(scores),
            step=step.kind,
        )


def rows_of_tables(model: nn.Module, signature: Signature) -> dict[str, int]:
    """Return the number of rows of every table, by table name.

    Raises:
        NothingToCompress: an input of the signature names a table that the model does not have.
    """
    rows = table_rows(model)
    for item in signature.inputs:
        for table in all_tables(item):
            if table not in rows:
                raise NothingToCompress(
                    "input_table_missing", input=item.name, table=table, tables=tuple(rows)
                )
    return rows


def _read_tensor_versions(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return name, address and version counter of every tensor, to detect in-place writes."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor.data_ptr(), tensor._version) for name, tensor in named]
