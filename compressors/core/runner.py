"""Run a compression step and check its contract.

Every step runs here. ``plan_choices`` first decides which tables and dense layers the step takes;
a step that does not follow this decision raises ``ContractBroken``.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import get_args

import torch
from torch import Tensor, nn

from compressors.contracts import (
    Bench,
    Frozen,
    Network,
    Part,
    PlanLine,
    Signature,
    is_out_of_memory,
)
from compressors.contracts.reasons import Reason
from compressors.core.batches import example
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.factored import FactoredLinear
from compressors.core.modules.formats import Bag, PackedTable, TensorSpec, blocks, entries
from compressors.core.modules.output_calibration import NAME, recalibration_of
from compressors.core.plan_lines import OUTPUT, build_plan, with_remarks
from compressors.core.state.module_state import load, records_of, save
from compressors.core.step import ModelStep as ModelStep
from compressors.core.step import TableStep as TableStep
from compressors.core.step import needs as needs
from compressors.core.step import wants as wants
from compressors.core.units import (
    EXCEPT,
    Choice,
    Unit,
    choose_tables,
    folded_norms,
    pack_table,
    stored_bytes,
    swap,
    table_rows,
)
from compressors.errors.compression import ContractBroken, ModelRefused, NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.quantize.better_format import best_format, table_bytes
from compressors.quantize.calibration.input_ranges import input_range_warnings

BLOCK_ROWS = 65_536
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


def run(
    step: TableStep | ModelStep,
    source: Model,
    bench: Bench,
    folder: Path,
    *,
    skipped: Mapping[str, Reason] = MappingProxyType({}),
) -> Model:
    """Apply one step, write the result to ``folder``, and return the model loaded from there.

    Args:
        step: the method and its settings.
        source: the model to compress; not modified.
        bench: the data that the step may use.
        folder: where the tensors are written; the returned module maps them.
        skipped: units that the step must not change, with the reasons.

    Raises:
        NothingToCompress: the step can compress no unit of this model, or the bench lacks a part.
        ContractBroken: the step changed its input, gave scores that are not finite, did not
            follow its choices, or its result gives other scores after it was stored.
        ModelRefused: the network does not run on inputs that its signature allows, or its scores
            are not finite.
        CompressionError: the step cannot be carried out on this model.
    """
    _require_parts(step, bench)
    versions = _versions(source.module)
    model = source.private()
    before = Unit.of(model.module)
    with _as_refusal(step):
        choices = plan_choices(step, model, bench, skipped)
        if isinstance(step, ModelStep):
            model = without_units(step, skipped).apply(model, bench)
        else:
            for unit in before:
                if choices[unit.name].take:
                    stored_by, _ = best_format(step, unit.weight)
                    packed = pack_table(unit.module, encode_table(stored_by, unit.weight))
                    swap(model.module, unit.name, packed)
    module = model.module.eval()
    if _versions(source.module) != versions:
        raise ContractBroken("source_changed", step=step.kind)
    after = Unit.of(module)
    _check_choices(step, choices, model.notes, Unit.of(source.module), after)
    inputs = example(bench.signature, rows_of_tables(module, bench.signature), CHECK_ROWS)
    expected = _scores(step, source, module, inputs)
    if not bool(torch.isfinite(expected).all()):
        _require_finite_source(step, source, inputs)
        raise ContractBroken("scores_not_finite", step=step.kind)
    ties = save(module, folder)
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
    choices = _as_found(step, choices, Unit.of(source.module), after)
    choices = {name: _noted(choice, model.notes.get(name, ())) for name, choice in choices.items()}
    line, folded = output_line(step, source, model), folded_norms(stored)
    warnings = input_range_warnings(source.module, stored, bench)
    plan = build_plan(step.kind, source, choices, before, after, sizes, line, folded, warnings)
    output = isinstance(step, ModelStep) and step.changes == "output"
    plan = with_remarks(plan, step.kind, skipped, choices, model.notes, changes_output=output)
    return Model(stored, source.architecture, network, plan)


@contextmanager
def _as_refusal(step: TableStep | ModelStep) -> Iterator[None]:
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


def output_line(step: TableStep | ModelStep, source: Model, model: Model) -> PlanLine | None:
    """Return the plan line of the map after a network's output; None if no step changed it."""
    recalibration = recalibration_of(model.module)
    if not isinstance(step, ModelStep) or step.changes != "output":
        return source.plan.of(OUTPUT) if source.plan else None
    return PlanLine(
        module=OUTPUT,
        role="other",
        format="as trained" if recalibration is None else recalibration.method,
        bytes_before=0,
        bytes_after=0 if recalibration is None else stored_bytes(recalibration),
        steps=() if recalibration is None else (step.kind,),
        reasons=model.notes.get(NAME, (Reason("selected", step=step.kind),)),
    )


def _require_parts(step: TableStep | ModelStep, bench: Bench) -> None:
    missing = [part for part in needs(step) if getattr(bench, part) is None]
    if missing:
        present = [part for part in get_args(Part) if getattr(bench, part) is not None]
        raise NothingToCompress(
            "rows_missing", step=step.kind, missing=tuple(missing), present=tuple(present)
        )


def _scores(
    step: TableStep | ModelStep, source: Model, model: nn.Module, inputs: dict[str, Tensor]
) -> Tensor:
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


def _require_finite_source(
    step: TableStep | ModelStep, source: Model, inputs: dict[str, Tensor]
) -> None:
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


def without_units(step: ModelStep, names: Collection[str]) -> ModelStep:
    """Return the step with name patterns that exclude units; unchanged if it has no patterns."""
    update = {
        field: (*getattr(step, field), *(EXCEPT + name for name in names))
        for field in ("tables", "layers")
        if names and hasattr(step, field)
    }
    return step.model_copy(update=update) if isinstance(step, Frozen) and update else step


def plan_choices(
    step: TableStep | ModelStep,
    model: Model,
    bench: Bench,
    skipped: Mapping[str, Reason] = MappingProxyType({}),
) -> dict[str, Choice]:
    """Choose for every unit of a model whether the step takes it, with the reasons.

    Args:
        step: the method and its settings.
        model: the model whose units are considered.
        bench: the data that the step may use.
        skipped: units that the step must not change, with the reasons.

    Raises:
        NothingToCompress: the step takes no unit.
    """
    units = Unit.of(model.module)
    if isinstance(step, ModelStep):
        chosen = without_units(step, skipped).choose(model, bench)
    else:
        chosen = choose_tables(units, step.tables, step.min_rows, step.kind)
        chosen |= {
            unit.name: _if_smaller(step, unit)
            for unit in units
            if unit.name in chosen and chosen[unit.name].take
        }
    chosen |= {
        unit.name: Choice(False, (Reason("skipped", step=step.kind, why=skipped[unit.name]),))
        for unit in units
        if unit.name in skipped
    }
    changes_output = isinstance(step, ModelStep) and step.changes == "output"
    if not changes_output and not any(choice.take for choice in chosen.values()):
        raise NothingToCompress(
            "units_missing",
            step=step.kind,
            reasons={name: choice.reasons for name, choice in chosen.items()},
        )
    rest = {
        unit.name: Choice(False, (Reason("wrong_role", step=step.kind, role=unit.role),))
        for unit in units
    }
    return {**rest, **chosen}


def _if_smaller(step: TableStep, unit: Unit) -> Choice:
    """Take a table if its best format is smaller than the present one."""
    rows, dim = unit.weight.shape
    stored_by, reasons = best_format(step, unit.weight)
    size = table_bytes(stored_by, rows, dim)
    if size >= unit.bytes:
        reason = Reason("not_smaller", step=stored_by.kind, bytes=size, present=unit.bytes)
        return Choice(False, (reason,))
    return Choice(True, reasons)


def encode_table(step: TableStep, weight: Tensor) -> PackedTable:
    """Encode a table, float ``(rows, dim)``, in the step's format, block by block.

    Raises:
        ContractBroken: the step encodes a tensor in another dtype than its layout says.
        CompressionError: the step cannot be carried out on this table.
    """
    rows, dim = weight.shape
    params = step.fit(weight)
    layout = step.storage.layout(rows, dim, step.settings())
    stored = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.items()}
    for name in [name for name, spec in layout.items() if not spec.every]:
        stored[name].copy_(_as_laid_out(step, name, params[name], layout[name]))
    for begin, end in blocks(layout, rows, BLOCK_ROWS):
        for name, tensor in step.encode(weight[begin:end], params).items():
            spec = layout[name]
            stored[name][entries(spec, begin, end)] = _as_laid_out(step, name, tensor, spec)
    return PackedTable(step.storage, rows, dim, step.settings(), stored)


def _as_laid_out(step: TableStep, name: str, tensor: Tensor, spec: TensorSpec) -> Tensor:
    if tensor.dtype != spec.dtype:
        raise ContractBroken(
            "encoded_dtype_differs",
            step=step.kind,
            name=name,
            got=str(tensor.dtype),
            expected=str(spec.dtype),
        )
    return tensor


def _check_choices(
    step: TableStep | ModelStep,
    choices: Mapping[str, Choice],
    notes: Mapping[str, tuple[Reason, ...]],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
) -> None:
    now = {unit.name: unit for unit in after}
    values = isinstance(step, ModelStep) and step.changes == "values"
    may_stay = isinstance(step, ModelStep) and step.changes in ("values", "parts")
    for unit in before:
        taken, new = choices[unit.name].take, now.get(unit.name)
        if new is None:
            if values and taken:
                continue
            raise ContractBroken("unit_lost", step=step.kind, unit=unit.name)
        # A method that changes values or searches for rows to remove may find no improvement and
        # leave a unit unchanged.
        kept = new.format == unit.format if not values else _equal(unit.module, new.module)
        has_note = taken and unit.name in notes  # the note says why the unit is unchanged
        if kept == taken and not (taken and (may_stay or has_note)):
            raise (
                ContractBroken("unit_kept", step=step.kind, unit=unit.name)
                if kept
                else ContractBroken("unit_changed", step=step.kind, unit=unit.name)
            )
        if values and new.format != unit.format:
            raise ContractBroken("format_changed", step=step.kind, unit=unit.name)
    old = {unit.name for unit in before}
    owners = {name for name, choice in choices.items() if choice.take}
    parts = isinstance(step, ModelStep) and step.changes == "parts"
    more = sorted(
        unit.name
        for unit in after
        if unit.name not in old and not (parts and _inside(unit.name, owners))
    )
    if more:
        raise ContractBroken("unit_added", step=step.kind, unit=more[0])


def _inside(name: str, owners: Collection[str]) -> bool:
    return any(name.startswith(f"{owner}.") for owner in owners)


def _as_found(
    step: TableStep | ModelStep,
    choices: Mapping[str, Choice],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
) -> dict[str, Choice]:
    """Return the choices, with a reason for units that the step took and left unchanged."""
    if not isinstance(step, ModelStep):
        return dict(choices)
    now = {unit.name: unit for unit in after}
    outcomes = dict(choices)
    for unit in before:
        new, choice = now.get(unit.name), choices[unit.name]
        if not choice.take or new is None:
            continue
        if step.changes == "format":
            if new.format == unit.format:
                outcomes[unit.name] = Choice(False, (Reason("kept_format", format=unit.format),))
        elif _equal(unit.module, new.module):
            outcomes[unit.name] = Choice(False, (*choice.reasons, Reason("nothing_better")))
    return outcomes


def _noted(choice: Choice, note: tuple[Reason, ...]) -> Choice:
    return replace(choice, reasons=(*choice.reasons, *note))


def _equal(old: nn.Module, new: nn.Module) -> bool:
    """Whether two modules have equal tensors; tensors in the same memory are not compared.

    Parts of composed tables and factored layers are separate units and do not count.
    """
    first, second = _direct_tensors(old), _direct_tensors(new)
    return first.keys() == second.keys() and all(
        tensor.data_ptr() == second[name].data_ptr()
        or (tensor.shape == second[name].shape and torch.equal(tensor, second[name]))
        for name, tensor in first.items()
    )


def _direct_tensors(module: nn.Module) -> dict[str, Tensor]:
    table = module.table if isinstance(module, Bag) else module
    if isinstance(table, ComposedTable | FactoredLinear):
        return dict(table.named_buffers(recurse=False))
    return dict(module.state_dict())


def _versions(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return name, address and version counter of every tensor, to detect in-place writes."""
    named = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor.data_ptr(), tensor._version) for name, tensor in named]
