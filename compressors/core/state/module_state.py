"""Build, save and load a module as tensors and records, with each table in memory only once.

A record (``ModuleRecord``) describes a compressed module. Loading builds the architecture with
parameters on the meta device and buffers with values, inserts compressed modules according to the
records, assigns memory-mapped tensors, restores ties (one tensor under several names), and raises
if any tensor is still on meta.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressors.contracts import ModuleRecord, Network, is_out_of_memory
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.factored import FACTORED, FactoredLinear
from compressors.core.modules.formats import Bag, FoldedNorm, PackedLinear, PackedTable
from compressors.core.modules.output_calibration import (
    RECALIBRATION,
    OutputMaps,
    Recalibration,
    attach,
)
from compressors.core.modules.pointwise import POINTWISE, PointwiseConv, replace_pointwise_convs
from compressors.core.modules.table_weight import TIED, TiedHead
from compressors.core.registries import COMPOSITIONS, LINEAR_FORMATS, TABLE_FORMATS
from compressors.core.state.construction import (
    NAMES_SHOWN,
    Construction,
    assign,
    construct,
    tensor_named,
    tensors_on_accelerator,
    tensors_without_values,
)
from compressors.core.state.meta_device import ConstructionLimits
from compressors.core.state.tensor_files import INDEX, SHARD_BYTES, TensorFile, write_tensors
from compressors.core.units import swap
from compressors.errors.compression import ModelRefused
from compressors.errors.construction import ConstructionFailed

log = logging.getLogger(__name__)
# If no gradients are needed, torch's attention layers use a fast path that returns NaN for a fully
# masked row. In training and in a lowered graph, attention of such a row is zero. Disabling the
# fast path makes inference compute the same scores.
torch.backends.mha.set_fastpath_enabled(False)

MIN_TENSOR_BYTES = 256 * 2**20
"""A constructor may always create tensors of this many bytes, for masks and position ids."""
MIN_TENSORS, TENSORS_PER_STORED = 10_000, 50
"""A constructor may create ``MIN_TENSORS`` tensors, and ``TENSORS_PER_STORED`` more for each stored
tensor."""


def build(architecture: type[nn.Module], network: Network) -> nn.Module:
    """Build a network with its compressed modules, with parameters on meta if possible.

    Args:
        architecture: the network's class.
        network: the configuration and the records of compressed modules.

    Raises:
        ModelRefused: the configuration does not fit the class, the class cannot be built, or a
            record names no module of the network.
    """
    return _build(architecture, network)[0]


def construction_notes(
    architecture: type[nn.Module], network: Network, folder: Path
) -> tuple[str, ...]:
    """Return notes for the user about how a network is built; most networks have none.

    Args:
        architecture: the network's class.
        network: the network's configuration.
        folder: folder of the stored tensors, whose size limits what the constructor may create.

    Raises:
        ModelRefused: the class cannot be built with this configuration.
    """
    return _construct(architecture, network, construction_limits(folder, network)).notes


def construction_limits(folder: Path, network: Network) -> ConstructionLimits:
    """Return limits on the tensors that a stored network's constructor may create.

    They stop a wrong or malicious configuration before its tensors are allocated. One tensor may
    have twice the bytes of all files in ``folder`` (a safety margin). The limits also depend on the
    full sizes in the records of ``network``, because the constructor creates each compressed table
    and layer at its full size.
    """
    stored, tensors = 0, 0
    for path in folder.glob("*.safetensors"):
        stored += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            tensors += len(file.keys())
    return ConstructionLimits(
        tensor_bytes=max(MIN_TENSOR_BYTES, 2 * stored, largest_replaced(network)),
        tensors=MIN_TENSORS + TENSORS_PER_STORED * (tensors + len(network.modules)),
    )


def largest_replaced(network: Network) -> int:
    """Return the bytes of the largest weight that a compressed module replaces after building."""
    return max((_compute_full_bytes(record) for record in network.modules.values()), default=0)


def _compute_full_bytes(record: ModuleRecord) -> int:
    """Return the bytes of the float32 weight that a compressed module replaces."""
    names = ("in_features", "out_features") if record.kind == "linear" else ("rows", "dim")
    sides = [record.settings.get(name) for name in names]
    numbers = [side for side in sides if isinstance(side, int) and side > 0]
    return 4 * math.prod(numbers) if len(numbers) == len(sides) else 0


def _construct(
    architecture: type[nn.Module], network: Network, limits: ConstructionLimits | None = None
) -> Construction:
    """Build the uncompressed network; raise ``ModelRefused`` if that fails."""
    try:
        return construct(architecture, network.architecture.config, limits)
    except ConstructionFailed as error:
        raise ModelRefused(
            "construction_failed", architecture=network.architecture.path, problem=str(error)
        ) from error


def _build(
    architecture: type[nn.Module], network: Network, limits: ConstructionLimits | None = None
) -> tuple[nn.Module, tuple[nn.Parameter, ...]]:
    """Build a network; also return the parameters of layers that compressed modules replaced."""
    construction = _construct(architecture, network, limits)
    model = construction.module
    for note in construction.notes:
        log.info("%s", note)
    replaced: list[nn.Parameter] = []
    _attach_recalibrations(model, network)
    for name, record in sorted(network.modules.items()):  # a composed table before its parts
        if record.kind == "output":
            continue
        module = build_module(name, record)
        try:
            replaced += model.get_submodule(name).parameters()
            if isinstance(module, TiedHead):
                module.set_table(model.get_submodule(module.table_name))
        except AttributeError as error:
            raise ModelRefused(
                "compressed_module_missing", name=name, architecture=network.architecture.path
            ) from error
        swap(model, name, module)
    return model, tuple(replaced)


def _attach_recalibrations(model: nn.Module, network: Network) -> None:
    """Attach the calibration map of the network's output, or the maps of its outputs.

    Raises:
        ModelRefused: the record of a map has the name of another module.
    """
    by_index: dict[int, Recalibration] = {}
    for name, record in network.modules.items():
        if record.kind != "output":
            continue
        prefix, _, index = name.rpartition(".")
        recalibration = build_module(name, record)
        if not isinstance(recalibration, Recalibration) or not (
            name == RECALIBRATION or (prefix == RECALIBRATION and index.isdecimal())
        ):
            raise ModelRefused(
                "compressed_module_missing", name=name, architecture=network.architecture.path
            )
        if name == RECALIBRATION:
            attach(model, recalibration)
        else:
            by_index[int(index)] = recalibration
    if by_index:
        attach(model, OutputMaps(by_index))


def build_module(name: str, record: ModuleRecord) -> nn.Module:
    """Build an empty compressed module from its record.

    Raises:
        ModelRefused: the format is unknown or the record is incomplete.
    """
    tables: Mapping[str, Any] = {**TABLE_FORMATS, **COMPOSITIONS}
    others: Mapping[str, Mapping[str, Any]] = {
        "linear": {**LINEAR_FORMATS, FACTORED: FactoredLinear, TIED: TiedHead},
        "norm": {"folded": FoldedNorm},
        "conv": {POINTWISE: PointwiseConv},
        "output": dict.fromkeys(("temperature", "platt", "isotonic"), Recalibration),
    }
    formats = others.get(record.kind, tables)
    if record.format not in formats:
        raise ModelRefused(
            "format_unknown", name=name, format=record.format, formats=tuple(sorted(formats))
        )
    storage, settings = formats[record.format], dict(record.settings)
    try:
        if record.kind == "norm":
            return FoldedNorm()
        if record.kind == "conv":
            inputs, outputs = settings["in_channels"], settings["out_channels"]
            linear = nn.Linear(inputs, outputs, bias=settings["bias"], device="meta")
            return PointwiseConv(linear)
        if record.kind == "output":
            name_of_output = settings.get("name")
            return Recalibration(
                record.format, settings["output"], name=name_of_output, knots=settings["knots"]
            )
        if record.kind == "linear":
            inputs, outputs = settings.pop("in_features"), settings.pop("out_features")
            bias = settings.pop("bias")
            if record.format == TIED:
                empty = nn.Parameter(torch.empty(outputs, device="meta")) if bias else None
                return TiedHead(nn.Identity(), empty, str(settings["table"]), (outputs, inputs))
            if record.format == FACTORED:
                return FactoredLinear(inputs, outputs, int(settings.pop("rank")), bias=bias)
            return PackedLinear(storage, inputs, outputs, bias=bias, settings=settings)
        bag = {
            key: settings.pop(key)
            for key in ("mode", "padding_idx", "include_last_offset")
            if record.kind == "bag"
        }
        rows, dim = int(settings.pop("rows")), int(settings.pop("dim"))
        table_class = ComposedTable if record.format in COMPOSITIONS else PackedTable
        table: nn.Module = table_class(storage, rows, dim, settings)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelRefused("record_incomplete", name=name, problem=repr(error)) from error
    return Bag(table, **bag) if record.kind == "bag" else table


def load(architecture: type[nn.Module], network: Network, folder: Path) -> nn.Module:
    """Load a module in evaluation mode, with the memory-mapped tensors of a folder.

    Convolutions of kernel size 1 are dense layers in the result (``PointwiseConv``).

    Args:
        architecture: the network's class.
        network: the configuration, the records of compressed modules and the ties.
        folder: the folder with the safetensors files.

    Raises:
        ModelRefused: tensors are missing, unexpected, of the wrong shape or dtype, or a tensor is
            still on the meta device.
    """
    model, replaced = _build(architecture, network, construction_limits(folder, network))
    tensors = map_tensors(folder)
    state = model.state_dict(keep_vars=True)
    for name, stored in network.ties.items():
        if stored not in tensors:
            raise ModelRefused("tie_not_stored", name=name, stored=stored)
        if name not in state or stored not in state:
            raise ModelRefused(
                "tie_unknown", name=name, stored=stored, architecture=network.architecture.path
            )
    undeclared_ties = _find_undeclared_ties(state, tensors, network.architecture.path)
    ties = {**network.ties, **undeclared_ties}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in undeclared_ties}
    _require_matching_tensors(model, tensors, network.model_copy(update={"ties": ties}))
    assign(model, tensors, strict=False)
    for name, stored in ties.items():
        parent_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent_name), attribute, tensor_named(model, stored))
    if names_without_values := tensors_without_values(model, replaced):
        raise ModelRefused("values_missing", names=tuple(names_without_values[:NAMES_SHOWN]))
    if names_on_accelerator := tensors_on_accelerator(model):
        raise ModelRefused(
            "tensors_on_accelerator",
            architecture=network.architecture.path,
            names=tuple(names_on_accelerator[:NAMES_SHOWN]),
        )
    return replace_pointwise_convs(model).eval()


def _find_undeclared_ties(
    state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str
) -> dict[str, str]:
    """Find undeclared ties: two stored tensors that are one tensor in the network.

    Returns:
        The name of each such tensor, and the name of the one it shares.

    Raises:
        ModelRefused: the two stored tensors have different values.
    """
    first_names: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        if name not in tensors:
            continue
        stored = first_names.setdefault(id(tensor), name)
        if stored == name:
            continue
        if not torch.equal(tensors[name], tensors[stored]):
            raise ModelRefused(
                "shared_tensor_differs", architecture=path, first=stored, second=name
            )
        ties[name] = stored
    return ties


def _require_matching_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], network: Network
) -> None:
    """Raise if stored tensors do not have the names, shapes and kinds of dtype of a model."""
    expected = dict(model.state_dict(keep_vars=True))
    missing = sorted(expected.keys() - tensors.keys() - network.ties.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ModelRefused(
            "tensors_differ",
            architecture=network.architecture.path,
            missing_count=len(missing),
            missing=tuple(missing[:NAMES_SHOWN]),
            unexpected_count=len(extra),
            unexpected=tuple(extra[:NAMES_SHOWN]),
        )
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(expected[name]):  # it takes the shape of the loaded tensor
            continue
        if tensor.shape != expected[name].shape:
            raise ModelRefused(
                "shape_differs",
                name=name,
                stored=list(tensor.shape),
                expected=list(expected[name].shape),
                architecture=network.architecture.path,
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ModelRefused(
                "dtype_differs",
                name=name,
                stored=str(tensor.dtype),
                expected=str(expected[name].dtype),
            )


def map_tensors(folder: Path) -> dict[str, Tensor]:
    """Memory-map every tensor of a folder's safetensors files, by name.

    Raises:
        ModelRefused: two files contain a tensor of the same name.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in tensors:
                    raise ModelRefused("tensor_stored_twice", name=name, folder=folder.name)
                tensors[name] = file.get_tensor(name)
    return tensors


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, by name, and the ties of a module.

    A tied tensor is stored once, under its first name; ties map its other names to this one. A
    tensor that shares only part of another's memory is no tie and is stored completely.
    """
    stored: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    names: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in names:
            ties[name] = names[key]
            continue
        names[key] = name
        stored[name] = tensor.detach().contiguous()
    return stored, ties


def build_records(model: nn.Module) -> dict[str, ModuleRecord]:
    """Return the record of every compressed module; a bag's record includes its table."""
    records: dict[str, ModuleRecord] = {}
    tables_of_bags: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Bag):
            tables_of_bags.add(f"{name}.table")
        if name in tables_of_bags or not isinstance(
            module,
            Bag
            | ComposedTable
            | PackedTable
            | FactoredLinear
            | PackedLinear
            | TiedHead
            | PointwiseConv
            | FoldedNorm
            | Recalibration,
        ):
            continue
        record = module.record()
        if record is not None:
            records[name] = record
    return records


def save(
    model: nn.Module,
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    *,
    files: Mapping[str, TensorFile] = MappingProxyType({}),
) -> dict[str, str]:
    """Write a module's tensors as safetensors files, which replace those in the folder.

    Args:
        model: the module.
        folder: the folder; created if it does not exist.
        shard_bytes: largest size of a file of small tensors.
        files: files of the module from which ``model`` was compressed. Files of unchanged tensors
            are hard-linked to ``folder``, not copied.

    Returns:
        The ties to write to ``model.json``.
    """
    tensors, ties = tensors_of(model)
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink(missing_ok=True)
    unchanged = {
        name: file.path
        for name, file in files.items()
        if name in tensors and file.holds(tensors[name])
    }
    write_tensors(tensors, folder, shard_bytes, unchanged=unchanged)
    return ties
