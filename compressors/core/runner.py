"""Run a compression step and check its contract.

Every step runs here. ``plan_step`` first decides which tables and dense layers the step takes; a
step that does not follow this plan raises ``ContractBroken``.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
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
    is_out_of_memory,
)
from compressors.contracts.reasons import Reason
from compressors.core.batches import example
from compressors.core.model import Model
from compressors.core.outcomes import settled
from compressors.core.plan_lines import OUTPUT, build_plan, output_line, with_remarks
from compressors.core.state.module_state import load, records_of, save
from compressors.core.steps.decisions import EXCEPT, Decision, StepPlan
from compressors.core.steps.step import Method, Step
from compressors.core.steps.table_step import as_step
from compressors.core.units import Unit, folded_norms, stored_bytes, table_rows
from compressors.errors.compression import ContractBroken, ModelRefused, NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.quantize.calibration.input_ranges import input_range_warnings

CHECK_ROWS = 32
REFUSALS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that a network's code raises if it does not support what a step does."""


class Planned(NamedTuple):
    """A step and its plan for one model, with a decision for every unit.

    Attributes:
        step: without the skipped units in its name patterns.
        plan: of this step.
        skipped: units that the step must not change, with the reasons.
    """

    step: Step
    plan: StepPlan[Any]
    skipped: Mapping[str, Reason]


def plan_step(
    method: Method,
    model: Model,
    bench: Bench,
    skipped: Mapping[str, Reason] = MappingProxyType({}),
) -> Planned:
    """Plan a step, and decide about the units that it does not mention.

    Args:
        method: the method and its settings.
        model: the model whose units are considered.
        bench: the data that the step may use.
        skipped: units that the step must not change, with the reasons.

    Raises:
        NothingToCompress: the step takes no unit.
        CompressionError: the step cannot be carried out on this model.
    """
    step, units = as_step(without_units(method, skipped)), Unit.of(model.module)
    plan = step.plan(model, bench)
    chosen = dict(plan.decisions)
    chosen |= {
        unit.name: Decision("skipped", (Reason("skipped", step=step.kind, why=skipped[unit.name]),))
        for unit in units
        if unit.name in skipped
    }
    if not any(decision.selected for decision in chosen.values()):
        raise NothingToCompress(
            "units_missing",
            step=step.kind,
            reasons={name: decision.reasons for name, decision in chosen.items()},
        )
    rest = {
        unit.name: Decision("skipped", (Reason("wrong_role", step=step.kind, role=unit.role),))
        for unit in units
    }
    return Planned(step, StepPlan({**rest, **chosen}, plan.payload), skipped)


def without_units(method: Method, names: Collection[str]) -> Method:
    """Return the method with name patterns that exclude units; unchanged if it has no patterns."""
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
    planned: Planned | None = None,
) -> Model:
    """Apply one step, write the result to ``folder``, and return the model loaded from there.

    Args:
        method: the method and its settings.
        source: the model to compress; not modified.
        bench: the data that the step may use.
        folder: where the tensors are written; the returned module maps them.
        skipped: units that the step must not change, with the reasons.
        planned: the plan for this model, bench and ``skipped``, if it has been made.

    Raises:
        NothingToCompress: the step can compress no unit of this model, or the bench lacks a part.
        ContractBroken: the step changed its input, gave scores that are not finite, did not
            follow its plan, or its result gives other scores after it was stored.
        ModelRefused: the network does not run on inputs that its signature allows, or its scores
            are not finite.
        CompressionError: the step cannot be carried out on this model.
    """
    _require_parts(method, bench)
    versions = _versions(source.module)
    model = source.private()
    with as_refusal(method):
        step, plan, skipped = planned or plan_step(method, model, bench, skipped)
        model, outcomes = step.apply(model, bench, plan)
    module = model.module.eval()
    if _versions(source.module) != versions:
        raise ContractBroken("source_changed", step=step.kind)
    before, after = Unit.of(source.module), Unit.of(module)
    decisions = settled(step.kind, step.effect, plan.decisions, outcomes, before, after)
    inputs = example(bench.signature, rows_of_tables(module, bench.signature), CHECK_ROWS)
    expected = _scores(step, source, module, inputs)
    if not bool(torch.isfinite(expected).all()):
        _require_finite_source(step, source, inputs)
        raise ContractBroken("scores_not_finite", step=step.kind)
    ties = save(module, folder, files=source.files)
    network = Network(
        architecture=model.network.architecture, modules=records_of(module), ties=ties
    )
    stored = load(source.architecture, network, folder)
    with torch.no_grad():
        again = stored(**inputs)
    if not torch.equal(again, expected):
        gap = float((again - expected).abs().max())
        raise ContractBroken("stored_scores_differ", step=step.kind, gap=gap)
    sizes = stored_bytes(source.module), stored_bytes(stored)
    line = output_line(step.kind, source, module, decisions.get(OUTPUT))
    warnings = input_range_warnings(source.module, stored, bench)
    folded = folded_norms(stored)
    lines = build_plan(step.kind, source, decisions, before, after, sizes, line, folded, warnings)
    learned = {name: outcome.reasons for name, outcome in outcomes.items()}
    lines = with_remarks(lines, step.kind, skipped, decisions, learned)
    return Model(stored, source.architecture, network, lines)


@contextmanager
def as_refusal(step: Method) -> Iterator[None]:
    """Raise errors of a network's code inside a step as ``StepRefused``.

    Raises:
        CompressionError: names the step and the exception.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as fault:
        raise StepRefused("network_not_changeable", step=step.kind, problem=repr(fault)) from fault


def _require_parts(step: Method, bench: Bench) -> None:
    missing = [part for part in step.needs if getattr(bench, part) is None]
    if missing:
        present = [part for part in get_args(Part) if getattr(bench, part) is not None]
        raise NothingToCompress(
            "rows_missing", step=step.kind, missing=tuple(missing), present=tuple(present)
        )


def _scores(step: Method, source: Model, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the compressed module's scores; raise for the step or the network that fails.

    Raises:
        ModelRefused: the uncompressed network fails as well.
        CompressionError: only the compressed network fails.
    """
    try:
        with torch.no_grad():
            scores: Tensor = model(**inputs)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        try:
            with torch.no_grad():
                source.private().module(**inputs)
        except Exception as first:
            if is_out_of_memory(first):
                raise
            raise ModelRefused(
                "network_fails", architecture=source.network.architecture.path, problem=repr(first)
            ) from first
        raise StepRefused("network_fails", step=step.kind, problem=repr(fault)) from fault
    return scores


def _require_finite_source(step: Method, source: Model, inputs: dict[str, Tensor]) -> None:
    """Raise if the uncompressed model gives scores that are not finite: the step is not the cause.

    Raises:
        ModelRefused: rows of valid inputs have no finite score; gives their number.
    """
    scores = _scores(step, source, source.private().module, inputs)
    bad = int((~torch.isfinite(scores)).reshape(len(scores), -1).any(dim=1).sum())
    if bad:
        raise ModelRefused(
            "scores_not_finite",
            architecture=source.network.architecture.path,
            count=bad,
            rows=len(scores),
            step=step.kind,
        )


def rows_of_tables(model: nn.Module, signature: Signature) -> dict[str, int]:
    """Return the rows of every table, and check that inputs of the signature name only these.

    Raises:
        NothingToCompress: an input names a table the model does not have.
    """
    rows = table_rows(model)
    for item in signature.inputs:
        table = getattr(item, "table", None)
        if table is not None and table not in rows:
            raise NothingToCompress(
                "input_table_missing", input=item.name, table=table, tables=tuple(rows)
            )
    return rows


def _versions(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return name, address and version counter of every tensor, to detect in-place writes."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor.data_ptr(), tensor._version) for name, tensor in named]
