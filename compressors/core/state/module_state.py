"""Save and load a module as tensors plus records, with each table in memory only once.

Loading (contract 2): build the architecture with parameters on the meta device and buffers with
values, insert compressed modules according to the records, assign memory-mapped tensors, restore
ties, and raise if any tensor is still on meta.
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
from compressors.core.modules.output_calibration import NAME as RECALIBRATION
from compressors.core.modules.output_calibration import Recalibration, attach
from compressors.core.registries import COMPOSITIONS, LINEAR_FORMATS, TABLE_FORMATS
from compressors.core.state.construction import (
    Construction,
    assign,
    construct,
    outside_cpu,
    unfilled,
)
from compressors.core.state.meta_device import Room
from compressors.core.state.tensor_files import INDEX, SHARD_BYTES, TensorFile, write_tensors
from compressors.core.units import swap
from compressors.errors.compression import ModelRefused
from compressors.errors.construction import ConstructionFailed

log = logging.getLogger(__name__)
# Without gradients torch's attention layers use a fast path that scores a fully masked row as NaN.
# With gradients, as in training, and in a lowered graph such a row attends to nothing. Without the
# fast path, inference gives the scores of training.
torch.backends.mha.set_fastpath_enabled(False)

LEAST_ROOM = 256 * 2**20
LEAST_TENSORS, TENSORS_PER_STORED = 10_000, 50


def build(architecture: type[nn.Module], network: Network) -> nn.Module:
    """Build the module with its compressed modules, parameters on meta if possible.

    Raises:
        ModelRefused: the configuration does not fit the class, the class cannot be built, or a
            record fits no module.
    """
    return _build(architecture, network)[0]


def construction_notes(
    architecture: type[nn.Module], network: Network, folder: Path
) -> tuple[str, ...]:
    """Return notes for the user about how a network is built; most networks have none.

    Args:
        architecture: its class.
        network: its configuration.
        folder: folder of its stored tensors, which limit what its constructor may create.

    Raises:
        ModelRefused: as ``build``.
    """
    return _construct(architecture, network, room_in(folder, network)).notes


def room_in(folder: Path, network: Network) -> Room:
    """Return limits of what a stored network's constructor may create, from its stored size.

    A compressed table or layer is first built at its full size, which its record states.
    ``LEAST_ROOM`` allows masks and position ids that no file stores.
    """
    stored, tensors = 0, 0
    for path in folder.glob("*.safetensors"):
        stored += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            tensors += len(file.keys())
    return Room(
        tensor_bytes=max(LEAST_ROOM, 2 * stored, largest_replaced(network)),
        tensors=LEAST_TENSORS + TENSORS_PER_STORED * (tensors + len(network.modules)),
    )


def largest_replaced(network: Network) -> int:
    """Return the bytes of the largest weight that is built on load and then replaced."""
    return max((_full_bytes(record) for record in network.modules.values()), default=0)


def _full_bytes(record: ModuleRecord) -> int:
    """Return the bytes of the float32 weight that a compressed module replaces."""
    names = ("in_features", "out_features") if record.kind == "linear" else ("rows", "dim")
    sides = [record.settings.get(name) for name in names]
    numbers = [side for side in sides if isinstance(side, int) and side > 0]
    return 4 * math.prod(numbers) if len(numbers) == len(sides) else 0


def _construct(
    architecture: type[nn.Module], network: Network, room: Room | None = None
) -> Construction:
    try:
        return construct(architecture, network.architecture.config, room)
    except ConstructionFailed as fault:
        raise ModelRefused(
            "construction_failed", architecture=network.architecture.path, problem=str(fault)
        ) from fault


def _build(
    architecture: type[nn.Module], network: Network, room: Room | None = None
) -> tuple[nn.Module, tuple[nn.Parameter, ...]]:
    """Build the module; also return the parameters of layers that compressed ones replaced."""
    construction = _construct(architecture, network, room)
    model = construction.module
    for note in construction.notes:
        log.info("%s", note)
    replaced: list[nn.Parameter] = []
    for name, record in sorted(network.modules.items()):  # a composed table before its parts
        if record.kind == "output":
            recalibration = module_of(name, record)
            if isinstance(recalibration, Recalibration) and name == RECALIBRATION:
                attach(model, recalibration)
                continue
        try:
            replaced += model.get_submodule(name).parameters()
        except AttributeError as fault:
            raise ModelRefused(
                "compressed_module_missing", name=name, architecture=network.architecture.path
            ) from fault
        swap(model, name, module_of(name, record))
    return model, tuple(replaced)


def module_of(name: str, record: ModuleRecord) -> nn.Module:
    """Build an empty compressed module from its record.

    Raises:
        ModelRefused: the format is unknown or the record is incomplete.
    """
    tables: Mapping[str, Any] = {**TABLE_FORMATS, **COMPOSITIONS}
    others: Mapping[str, Mapping[str, Any]] = {
        "linear": {**LINEAR_FORMATS, FACTORED: FactoredLinear},
        "norm": {"folded": FoldedNorm},
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
        if record.kind == "output":
            return Recalibration(record.format, settings["output"], knots=settings["knots"])
        if record.kind == "linear":
            inputs, outputs = settings.pop("in_features"), settings.pop("out_features")
            bias = settings.pop("bias")
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
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as fault:
        if is_out_of_memory(fault):
            raise
        raise ModelRefused("record_incomplete", name=name, problem=repr(fault)) from fault
    return Bag(table, **bag) if record.kind == "bag" else table


def load(architecture: type[nn.Module], network: Network, folder: Path) -> nn.Module:
    """Load a module in evaluation mode over memory-mapped tensors of ``folder``.

    Raises:
        ModelRefused: tensors are missing, unexpected, of the wrong shape or dtype, or a tensor is
            still on the meta device.
    """
    model, replaced = _build(architecture, network, room_in(folder, network))
    tensors = mapped(folder)
    state = model.state_dict(keep_vars=True)
    for name, stored in network.ties.items():
        if stored not in tensors:
            raise ModelRefused("tie_not_stored", name=name, stored=stored)
        if name not in state or stored not in state:
            raise ModelRefused(
                "tie_unknown", name=name, stored=stored, architecture=network.architecture.path
            )
    copies = _stored_twice(state, tensors, network.architecture.path)
    ties = {**network.ties, **copies}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in copies}
    _check_fit(model, tensors, network.model_copy(update={"ties": ties}))
    assign(model, tensors, strict=False)
    for name, stored in ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, _tensor(model, stored))
    if left := unfilled(model, replaced):
        raise ModelRefused("values_missing", names=tuple(left[:5]))
    if moved := outside_cpu(model):
        raise ModelRefused(
            "tensors_on_accelerator", architecture=network.architecture.path, names=tuple(moved[:5])
        )
    return model.eval()


def _stored_twice(
    state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str
) -> dict[str, str]:
    """Find undeclared ties: stored tensors that the network shares with another stored one.

    Raises:
        ModelRefused: the two have different values.
    """
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        if name not in tensors:
            continue
        stored = first.setdefault(id(tensor), name)
        if stored == name:
            continue
        if not torch.equal(tensors[name], tensors[stored]):
            raise ModelRefused(
                "shared_tensor_differs", architecture=path, first=stored, second=name
            )
        ties[name] = stored
    return ties


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor], network: Network) -> None:
    expected = dict(model.state_dict(keep_vars=True))
    missing = sorted(expected.keys() - tensors.keys() - network.ties.keys())
    extra = sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ModelRefused(
            "tensors_differ",
            architecture=network.architecture.path,
            missing_count=len(missing),
            missing=tuple(missing[:5]),
            unexpected_count=len(extra),
            unexpected=tuple(extra[:5]),
        )
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(
            expected[name]
        ):  # a lazy parameter has the shape of the loaded tensor
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


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def mapped(folder: Path) -> dict[str, Tensor]:
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
    """Return a module's stored tensors, each once, and ties: name to the shared stored name.

    A tensor that shares only part of another's memory is stored whole: a view is not a tie.
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


def records_of(model: nn.Module) -> dict[str, ModuleRecord]:
    """Return the record of every compressed module; a bag's record includes its table."""
    records: dict[str, ModuleRecord] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Bag):
            inside.add(f"{name}.table")
        if name in inside or not isinstance(
            module,
            Bag
            | ComposedTable
            | PackedTable
            | FactoredLinear
            | PackedLinear
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
    """Write a module's tensors as safetensors, in place of earlier ones in the folder.

    Args:
        model: the module.
        folder: created if it does not exist.
        shard_bytes: most bytes of small tensors in one file.
        files: files of the network that the module was made from; those of unchanged tensors are
            linked.

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
