"""Build a network from its class and configuration, and assign stored tensors.

``construct`` builds without weights (``meta_device.py``), so loading takes no more memory than the
stored file. If the constructor reads parameter values, the network is built again with all its
weights, and a note says so. ``assign`` fills a network so that every reference to a parameter, in a
list or dictionary too, has the stored values.
"""

import copy
import inspect
import linecache
import re
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressors.contracts import is_out_of_memory
from compressors.core.state.meta_device import (
    ACCELERATOR,
    Placement,
    Room,
    exchange,
    on_cpu,
    parameters_on_meta,
)
from compressors.core.state.plain_values import plain_tensors, plain_values
from compressors.errors.compression import ModelRefused
from compressors.errors.construction import ConstructionFailed, TooLarge

_LIBRARY_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
NAMES_SHOWN = 5
_ENDS_TEXT = re.compile(r"""["'\\\r\n\0]""")


@dataclass(frozen=True)
class Construction:
    """A network built from its class, and notes for the user about the construction."""

    module: nn.Module
    notes: tuple[str, ...] = ()


def construct(
    architecture: type[nn.Module], config: Mapping[str, Any], room: Room | None = None
) -> Construction:
    """Build a network, with parameters on the meta device if its class allows it.

    Args:
        architecture: its class.
        config: keyword arguments; not modified.
        room: limits of what its constructor may create; without it there are none.

    Returns:
        The network on the CPU. Parameters have no values, unless a note says that the constructor
        needs them. Buffers and plain tensors have values.

    Raises:
        ConstructionFailed: the arguments do not fit, the constructor raises, or an attribute has
            a name that could run as code.
        ModelRefused: a tensor that no file stores depends on random initial weights.
    """
    construction = _constructed(architecture, config, room)
    _require_safe_names(architecture, construction.module)
    return construction


def _constructed(
    architecture: type[nn.Module], config: Mapping[str, Any], room: Room | None
) -> Construction:
    _require_arguments(architecture, config)
    try:
        with parameters_on_meta(copy.copy(room)) as placement:
            module = architecture(**copy.deepcopy(dict(config)))
    except TooLarge as fault:
        raise ConstructionFailed("tensors_too_large", problem=str(fault)) from fault
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        reason = f"its constructor reads weight values ({_place(fault)})"
        return _with_values(architecture, config, reason, room)
    _link_views(module, placement)
    recomputed = {name for name, *_ in _computed_weights(module)}
    if lost := [name for name in _without_values(module) if name not in recomputed]:
        reason = f"its constructor computes {_listed(lost)} from weight values"
        built = _with_values(architecture, config, reason, room)
        _require_equal(
            architecture, built.module, construct_with_weights(architecture, config), lost
        )
        return built
    return Construction(module, _device_notes(module, placement))


def construct_with_weights(architecture: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """Build a network with the initial weights of its class, on the CPU.

    Raises:
        ConstructionFailed: as ``construct``.
    """
    _require_arguments(architecture, config)
    module = _real(architecture, config)[0]
    _require_safe_names(architecture, module)
    return module


def assign(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool) -> None:
    """Replace a network's tensors by stored ones, without copying.

    Differs: ``load_state_dict(assign=True)`` puts new objects into the modules, so lists of
    parameters keep the old objects. Here the old objects receive the new values, and plain tensors
    that are views of a parameter become views of the new one.

    Args:
        module: the network.
        tensors: stored tensors by name; not copied.
        strict: whether they must be exactly the tensors of the network.
    """
    previous = dict(module.state_dict(keep_vars=True))
    places = {
        tensor.untyped_storage()._cdata: (name, tensor.stride(), tensor.storage_offset())
        for name, tensor in previous.items()
        if name in tensors and _has_storage(tensor)
    }
    known = {id(tensor) for tensor in previous.values()}
    views = [
        (tensor, *places[tensor.untyped_storage()._cdata])
        for _, tensor in plain_tensors(module)
        if id(tensor) not in known and _is_in(tensor, places)
    ]
    geometry = [(view.shape, view.stride(), view.storage_offset()) for view, *_ in views]
    # New objects, because the stored ones may belong to another network; ties are preserved.
    fresh: dict[int, Tensor] = {}
    assigned = {
        name: fresh.setdefault(id(value), _same_values(value)) for name, value in tensors.items()
    }
    module.load_state_dict(assigned, strict=strict, assign=True)
    stands_for: dict[int, Tensor] = {}
    exchanged: set[int] = set()
    loaded = module.state_dict(keep_vars=True)
    for name, old in previous.items():
        new = loaded[name]
        if new is old:
            continue
        if id(new) not in stands_for:
            if id(old) in exchanged or not exchange(old, new):
                continue
            exchanged.add(id(old))
            stands_for[id(new)] = old
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, stands_for[id(new)])
    for (view, name, stride, start), (shape, steps, offset) in zip(views, geometry, strict=True):
        values = _named(module, name).detach()
        if values.stride() == stride:  # else it has no values, and loading raises
            begin = values.storage_offset() + offset - start
            exchange(view, values.as_strided(shape, steps, begin))
    _recompute(module)


def unfilled(module: nn.Module, replaced: Iterable[Tensor] = ()) -> list[str]:
    """Return names of tensors that have no values after loading.

    Args:
        module: a loaded network.
        replaced: parameters of layers that compressed ones replaced; plain lists may still contain
            them, and they are ignored.
    """
    ignored = {tensor.untyped_storage()._cdata for tensor in replaced if _has_storage(tensor)}
    every = dict((*module.named_parameters(), *module.named_buffers(), *plain_tensors(module)))
    return [
        name for name, tensor in every.items() if tensor.is_meta and not _is_in(tensor, ignored)
    ]


def outside_cpu(module: nn.Module) -> list[str]:
    """Return names of tensors that are on an accelerator."""
    every = dict((*module.named_parameters(), *module.named_buffers(), *plain_tensors(module)))
    return [name for name, tensor in every.items() if tensor.device.type not in ("cpu", "meta")]


def differing_tensors(first: nn.Module, second: nn.Module) -> list[str]:
    """Return names of unstored tensors that differ between two loaded networks."""
    other = dict(plain_tensors(second))
    return [
        name
        for name, tensor in plain_tensors(first)
        if name not in other or not _equal(tensor, other[name])
    ]


def _with_values(
    architecture: type[nn.Module], config: Mapping[str, Any], reason: str, room: Room | None
) -> Construction:
    """Build a network with initial weights, and a note that gives the reason."""
    module, placement = _real(architecture, config, room)
    note = (
        f"{architecture.__name__} is built with all its weights in memory each time it is loaded, "
        f"because {reason}. Memory while loading is that of the weights, not of the file's pages."
    )
    return Construction(module, (note, *_device_notes(module, placement)))


def _real(
    architecture: type[nn.Module], config: Mapping[str, Any], room: Room | None = None
) -> tuple[nn.Module, Placement]:
    try:
        with on_cpu(copy.copy(room)) as placement:
            module = architecture(**copy.deepcopy(dict(config)))
    except TooLarge as fault:
        raise ConstructionFailed("tensors_too_large", problem=str(fault)) from fault
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise _failure(architecture, fault) from fault
    return module, placement


def _require_arguments(architecture: type[nn.Module], config: Mapping[str, Any]) -> None:
    """Raise if a configuration does not fit the class's keyword arguments."""
    signature = inspect.signature(architecture)
    try:
        signature.bind(**config)
    except TypeError as fault:
        named = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        raise ConstructionFailed(
            "arguments_wrong", problem=str(fault), arguments=tuple(named)
        ) from fault


def _failure(architecture: type[nn.Module], fault: Exception) -> ConstructionFailed:
    """Build the error for a constructor that raised."""
    error, place = type(fault).__name__, _place(fault)
    problem, name = (str(fault).strip() or "no message").rstrip("."), architecture.__name__
    if any(word in problem for word in ("CUDA", "cuda", "NVIDIA", "accelerator")):
        return ConstructionFailed(
            "constructor_needs_gpu", error=error, place=place, problem=problem, architecture=name
        )
    return ConstructionFailed(
        "constructor_raised", error=error, place=place, problem=problem, architecture=name
    )


def _require_safe_names(architecture: type[nn.Module], module: nn.Module) -> None:
    """Raise for attribute names that could inject code into the source that torch generates.

    ``torch.fx`` writes an attribute path as ``getattr(self.tables, "name")`` without escaping the
    name, and runs that code (``torch/fx/graph.py``, ``_format_target``). Names often come from the
    configuration, which is untrusted: a class may use the name of each feature for its table.
    """
    for path, part in module.named_modules():
        for name in (*vars(part), *part._modules, *part._parameters, *part._buffers):
            if _ENDS_TEXT.search(name):
                raise ConstructionFailed(
                    "attribute_name_unsafe",
                    name=name,
                    module=f"{architecture.__name__}.{path}".rstrip("."),
                )


def _place(fault: BaseException) -> str:
    """Describe the innermost line of the user's code in a traceback."""
    frames = traceback.extract_tb(fault.__traceback__)
    user_frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARY_FOLDERS)]
    if not user_frames:
        return "its call"
    frame = user_frames[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"{where}: {line}" if line else where


def _link_views(module: nn.Module, placement: Placement) -> None:
    """Make plain tensors that shared a parameter's former memory views of the parameter."""
    originals = {
        ref.cdata: parameter
        for ref, parameter in placement.originals
        if not ref.expired()  # type: ignore[no-untyped-call]
    }
    if not originals:
        return
    for _, tensor in plain_tensors(module):
        if tensor.is_meta or not _has_storage(tensor):
            continue
        parameter = originals.get(tensor.untyped_storage()._cdata)
        if parameter is not None:
            shape, stride, begin = tensor.shape, tensor.stride(), tensor.storage_offset()
            exchange(tensor, parameter.detach().as_strided(shape, stride, begin))


def _without_values(module: nn.Module) -> list[str]:
    """Return names of plain tensors on meta that are no views of a stored tensor: never filled."""
    stored = module.state_dict(keep_vars=True).values()
    filled = {tensor.untyped_storage()._cdata for tensor in stored if _has_storage(tensor)}
    return [
        name
        for name, tensor in plain_tensors(module)
        if tensor.is_meta and not _is_in(tensor, filled)
    ]


def _require_equal(
    architecture: type[nn.Module], first: nn.Module, second: nn.Module, names: list[str]
) -> None:
    """Raise if plain tensors differ between two constructions: they cannot be loaded."""
    differing = [name for name in differing_tensors(first, second) if name in names]
    if differing:
        raise ModelRefused(
            "initial_weights_used",
            architecture=architecture.__name__,
            names=tuple(differing[:NAMES_SHOWN]),
            count=len(differing),
        )


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))


def _device_notes(module: nn.Module, placement: Placement) -> tuple[str, ...]:
    """Set device attributes of the network to the CPU; return a note if there was another."""
    changed = []
    for item in list(plain_values(module)):
        value = item.value
        if isinstance(value, torch.device) and value.type != "cpu":
            device: Any = torch.device("cpu")
        elif isinstance(value, str) and ACCELERATOR.fullmatch(value) and "dev" in item.name.lower():
            device = "cpu"
        else:
            continue
        if item.replace(device):
            changed.append(item.path)
    if not placement.devices and not changed:
        return ()
    names = ", ".join(placement.devices) or "another device"
    also = f" Set to 'cpu': {_listed(changed)}." if changed else ""
    return (
        f"The constructor places the network on {names}; recpress builds it on the CPU and decides "
        f"the device itself.{also}",
    )


def _same_values(tensor: Tensor) -> Tensor:
    """Create another tensor object over the same memory."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()


def _computed_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield plain weights that hooks of ``nn.utils`` compute from parameters before a forward."""
    for name, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                yield f"{name}.{hook.name}".removeprefix("."), part, hook
            elif isinstance(hook, BasePruningMethod):
                yield f"{name}.{hook._tensor_name}".removeprefix("."), part, hook


@torch.no_grad()
def _recompute(module: nn.Module) -> None:
    """Compute hook weights from the loaded parameters; spectral norm without power iteration."""
    for name, part, hook in _computed_weights(module):
        if isinstance(hook, BasePruningMethod):
            weight = hook.apply_mask(part)  # type: ignore[no-untyped-call]
        elif isinstance(hook, SpectralNorm):
            weight = hook.compute_weight(part, do_power_iteration=False)
        else:
            weight = hook.compute_weight(part)
        setattr(part, name.rpartition(".")[2], weight)


def _named(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has memory that a view could share (sparse and lazy ones have none)."""
    return tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor)


def _is_in(tensor: Tensor, storages: Container[int]) -> bool:
    """Whether a tensor shares one of these memories."""
    return _has_storage(tensor) and tensor.untyped_storage()._cdata in storages


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")
