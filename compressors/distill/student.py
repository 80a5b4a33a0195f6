"""Build the student: a smaller network of the same class, with the original's tensors that fit.

A table is reused, packed (stored in a compressed format) or not, if the student has a table with
the same number of rows and the same width (columns). Dense layers must be float32, because the
student's are initialized and trained.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.formats import Bag, PackedTable
from compressors.core.modules.output_calibration import find_recalibration
from compressors.core.modules.pointwise import replace_pointwise_convs
from compressors.core.modules.table_weight import TIED
from compressors.core.placeholders import insert_placeholders
from compressors.core.state.construction import assign, construct, construct_with_weights
from compressors.core.steps.decisions import Decision
from compressors.core.units import Unit, swap, table_rows
from compressors.errors.construction import ConstructionFailed
from compressors.errors.steps import DistillationRefused

Config = dict[str, Any]


def student_decisions(
    model: Model, config: Config, *, tables: bool, reasons: tuple[Reason, ...]
) -> dict[str, Decision]:
    """Return the decisions for all units that are missing or smaller in the student.

    Args:
        model: the original.
        config: arguments of the model class that differ.
        tables: whether tables are trained; otherwise a table with fewer columns is refused, because
            it would keep random values.
        reasons: the rows and teachers that the student is trained on.

    Raises:
        DistillationRefused: the student cannot be built, has layers that the original lacks, or
            differs from it in a way that is not supported.
    """
    _require_no_map(model)
    _require_float_layers(model)
    _require_arguments(model, config)
    units = Unit.of(model.module)
    # ``part_of`` is set for the parts of a composed table (built from smaller tables) or of a
    # factored layer (a product of two). The model class constructs only the whole.
    original_shapes = {unit.name: _get_shape(unit) for unit in units if unit.part_of is None}
    student = Unit.of(_build(model, config, _construct_empty))
    student_shapes = {unit.name: _get_shape(unit) for unit in student}
    if added := sorted(student_shapes.keys() - original_shapes.keys()):
        raise DistillationRefused("layer_added", unit=added[0])
    original_rows = table_rows(model.module)
    for unit in student:
        if unit.role == "table" and unit.rows < original_rows[unit.name]:
            raise DistillationRefused(
                "table_shortened", table=unit.name, got=unit.rows, expected=original_rows[unit.name]
            )
    _require_packed_fit(units, student_shapes)
    resized = [
        u.name
        for u in student
        if u.role == "table" and student_shapes[u.name] != original_shapes[u.name]
    ]
    if resized and not tables:
        raise DistillationRefused("table_untrained", table=resized[0])
    decisions = {}
    for name, shape in original_shapes.items():
        if name not in student_shapes:
            decisions[name] = Decision("taken", (*reasons, Reason("not_in_student")))
        elif student_shapes[name] != shape:
            before, after = ("x".join(map(str, size)) for size in (shape, student_shapes[name]))
            changed = Reason("smaller_in_student", before=before, after=after)
            decisions[name] = Decision("taken", (*reasons, changed))
    return decisions


def build_student(model: Model, config: Config, seed: int) -> Model:
    """Build the smaller network, with new layers and those tensors of the original that fit.

    Raises:
        DistillationRefused: the student cannot be built.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        student = _build(model, config, construct_with_weights)
    return _assign_original_tensors(model, student, config)


def student_dry_run(model: Model, config: Config) -> Model:
    """Build the network of ``build_student`` with placeholders instead of initialized weights."""
    student = _build(model, config, _construct_empty)
    return _assign_original_tensors(model, insert_placeholders(student), config)


def _build(
    model: Model, config: Config, construct_module: Callable[[type[nn.Module], Config], nn.Module]
) -> nn.Module:
    """Construct the model class with some arguments replaced.

    Raises:
        DistillationRefused: the class cannot be constructed.
    """
    try:
        return construct_module(model.architecture, {**model.network.architecture.config, **config})
    except ConstructionFailed as fault:
        raise DistillationRefused(
            "construction_failed",
            architecture=model.network.architecture.path,
            config=dict(config),
            problem=str(fault),
        ) from fault


def _construct_empty(architecture: type[nn.Module], config: Config) -> nn.Module:
    """Construct the network without weights, if its class allows that."""
    return construct(architecture, config).module


def _assign_original_tensors(model: Model, student: nn.Module, config: Config) -> Model:
    """Assign the original's tensors to the student where their shapes match."""
    # Convolutions of kernel size 1 become dense layers, as in every loaded model.
    replace_pointwise_convs(student)
    student_names = {unit.name for unit in Unit.of(student)}
    for unit in Unit.of(model.module):
        if _is_packed_table(unit) and unit.name in student_names and unit.part_of is None:
            swap(student, unit.name, unit.module)
    student_tensors = student.state_dict(keep_vars=True)
    fitting = {
        name: tensor
        for name, tensor in model.module.state_dict(keep_vars=True).items()
        if name in student_tensors and tensor.shape == student_tensors[name].shape
    }
    assign(student, fitting, strict=False)
    merged = {**model.network.architecture.config, **config}
    architecture = model.network.architecture.model_copy(update={"config": merged})
    network = model.network.model_copy(update={"architecture": architecture})
    return replace(model, module=student.eval(), network=network)


def _get_shape(unit: Unit) -> tuple[int, ...]:
    """Return a table's ``(rows, dim)``, a layer's ``(out, in)``, or ``(rows,)`` without weight."""
    module = _unwrap_bag(unit)
    if isinstance(module, PackedTable | ComposedTable):
        return (module.rows, module.dim)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else (unit.rows,)


def _unwrap_bag(unit: Unit) -> nn.Module:
    """Return the module of a unit or, if it is a compressed EmbeddingBag, the table inside."""
    return unit.module.table if isinstance(unit.module, Bag) else unit.module


def _is_packed_table(unit: Unit) -> bool:
    return unit.role == "table" and isinstance(_unwrap_bag(unit), PackedTable | ComposedTable)


def _require_packed_fit(
    units: tuple[Unit, ...], student_shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raise if the student has a packed table in another shape.

    Raises:
        DistillationRefused: there is such a table; the error names it.
    """
    for unit in units:
        if _is_packed_table(unit) and student_shapes.get(unit.name, _get_shape(unit)) != _get_shape(
            unit
        ):
            raise DistillationRefused("table_packed", table=unit.name, format=unit.format)


def _require_float_layers(model: Model) -> None:
    """Raise if a dense layer is packed, or a table has a float dtype other than float32.

    Raises:
        DistillationRefused: there is such a unit; the error names it.
    """
    for unit in Unit.of(model.module):
        is_float = unit.format in ("float32", TIED)  # TIED: the weight is that of a table
        if not is_float and not (_is_packed_table(unit) or unit.part_of is not None):
            raise DistillationRefused("layer_packed", layer=unit.name)


def _require_no_map(model: Model) -> None:
    """Raise if the model's output is recalibrated: the map was fitted to another network.

    Raises:
        DistillationRefused: there is a recalibration map.
    """
    if find_recalibration(model.module) is not None:
        raise DistillationRefused("already_recalibrated")


def _require_arguments(model: Model, config: Config) -> None:
    """Raise if an argument is unknown, because a class that accepts any keyword would ignore it.

    Raises:
        DistillationRefused: an argument is unknown; the error names it and the known arguments.
    """
    parameters = inspect.signature(model.architecture).parameters
    known = {*parameters, *model.network.architecture.config}
    if unknown := sorted(config.keys() - known):
        raise DistillationRefused(
            "argument_unknown",
            architecture=model.network.architecture.path,
            argument=unknown[0],
            arguments=tuple(sorted(known)),
        )
