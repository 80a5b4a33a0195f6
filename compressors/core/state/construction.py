"""Build a network from its class and configuration, and assign stored tensors.

``construct`` builds a network with parameters on torch's meta device, where tensors have a shape
and no values (``meta_device.py``), so loading takes no more memory than the stored file. If the
constructor reads weight values, the network is built again with its initial weights, and a note to
the user says so. ``assign`` gives stored values to a network so that every reference to a
parameter, also in a list or dictionary, has them.

"Plain tensors" are tensors in attributes that are neither parameters nor buffers, or in lists and
objects there (``plain_values.py``). A state dict does not contain them.
"""

import copy
import inspect
import linecache
import re
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from compressors.contracts import is_out_of_memory
from compressors.core.state.argument_values import decode_arguments
from compressors.core.state.meta_device import (
    ACCELERATOR,
    ConstructionLimits,
    Placement,
    create_on_cpu,
    exchange,
    parameters_on_meta,
)
from compressors.core.state.plain_values import plain_tensors, plain_values
from compressors.errors.compression import ModelRefused
from compressors.errors.construction import ConstructionFailed, TooLarge

_LIBRARY_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
NAMES_SHOWN = 5  # in messages
_UNSAFE_IN_TEXT = re.compile(r"""["'\\\r\n\0]""")


@dataclass(frozen=True)
class Construction:
    """A network built from its class, and notes for the user about the construction."""

    module: nn.Module
    notes: tuple[str, ...] = ()


def construct(
    architecture: type[nn.Module],
    config: Mapping[str, Any],
    limits: ConstructionLimits | None = None,
) -> Construction:
    """Build a network, with parameters on the meta device if its class allows it.

    Args:
        architecture: the network's class.
        config: keyword arguments of the class; not modified.
        limits: limits on the tensors that the constructor may create; None for no limits.

    Returns:
        The network on the CPU. Its parameters have no values, unless a note says that the
        constructor needs them. Buffers and plain tensors have values.

    Raises:
        ConstructionFailed: the arguments do not fit, the constructor raises, or an attribute has
            a name that could run as code.
        ModelRefused: a plain tensor, which no file stores, depends on random initial weights.
    """
    construction = _construct_unchecked(architecture, config, limits)
    _require_safe_names(architecture, construction.module)
    return construction


def _construct_unchecked(
    architecture: type[nn.Module], config: Mapping[str, Any], limits: ConstructionLimits | None
) -> Construction:
    """Build a network; attribute names are not checked."""
    _require_arguments(architecture, config)
    try:
        # A copy of the limits, because each created tensor is subtracted from them.
        with parameters_on_meta(copy.copy(limits)) as placement:
            module = architecture(**decode_arguments(config))
    except TooLarge as error:
        raise ConstructionFailed("tensors_too_large", problem=str(error)) from error
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ConstructionFailed):
            raise
        reason = f"its constructor reads weight values ({_describe_source_line(error)})"
        return _construct_with_note(architecture, config, reason, limits)
    _link_views(module, placement)
    recomputed = {name for name, *_ in _find_computed_weights(module)}
    if names_without_values := [
        name for name in _find_plain_tensors_without_values(module) if name not in recomputed
    ]:
        reason = f"its constructor computes {_list_names(names_without_values)} from weight values"
        construction = _construct_with_note(architecture, config, reason, limits)
        _require_equal(
            architecture,
            construction.module,
            construct_with_weights(architecture, config),
            names_without_values,
        )
        return construction
    return Construction(module, _correct_device_attributes(module, placement))


def construct_with_weights(architecture: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """Build a network with the initial weights of its class, on the CPU.

    Raises:
        ConstructionFailed: for the reasons that ``construct`` lists.
    """
    _require_arguments(architecture, config)
    module = _construct_on_cpu(architecture, config)[0]
    _require_safe_names(architecture, module)
    return module


def assign(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool) -> None:
    """Replace a network's tensors by stored ones, without copying.

    Differs from ``load_state_dict(assign=True)``: that puts new tensor objects into the modules, so
    lists of parameters still contain the old objects. Here the old objects receive the new values,
    and plain tensors that are views of a parameter become views of its new values.

    Args:
        module: the network.
        tensors: stored tensors by name; not copied.
        strict: whether the names must be exactly those of the network's state dict.
    """
    previous_state = dict(module.state_dict(keep_vars=True))
    memory_of_state = {
        tensor.untyped_storage()._cdata: (name, tensor.stride(), tensor.storage_offset())
        for name, tensor in previous_state.items()
        if name in tensors and _has_storage(tensor)
    }
    state_ids = {id(tensor) for tensor in previous_state.values()}
    views = [
        (tensor, *memory_of_state[tensor.untyped_storage()._cdata])
        for _, tensor in plain_tensors(module)
        if id(tensor) not in state_ids and _is_in(tensor, memory_of_state)
    ]
    view_layouts = [(view.shape, view.stride(), view.storage_offset()) for view, *_ in views]
    # New tensor objects, because the stored ones may belong to another network. A tensor with
    # several names gets one object, so ties are preserved.
    new_objects: dict[int, Tensor] = {}
    assigned = {
        name: new_objects.setdefault(id(value), _share_memory(value))
        for name, value in tensors.items()
    }
    module.load_state_dict(assigned, strict=strict, assign=True)
    replacement: dict[int, Tensor] = {}
    exchanged: set[int] = set()
    loaded_state = module.state_dict(keep_vars=True)
    for name, previous_tensor in previous_state.items():
        loaded_tensor = loaded_state[name]
        if loaded_tensor is previous_tensor:
            continue
        if id(loaded_tensor) not in replacement:
            if id(previous_tensor) in exchanged or not exchange(previous_tensor, loaded_tensor):
                continue
            exchanged.add(id(previous_tensor))
            replacement[id(loaded_tensor)] = previous_tensor
        parent_name, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent_name), attribute, replacement[id(loaded_tensor)])
    for (view, name, stride, parameter_offset), (shape, view_stride, offset) in zip(
        views, view_layouts, strict=True
    ):
        values = tensor_named(module, name).detach()
        if values.stride() == stride:  # otherwise it has no values, and loading raises an error
            begin = values.storage_offset() + offset - parameter_offset
            exchange(view, values.as_strided(shape, view_stride, begin))
    _recompute_weights(module)


def tensors_without_values(module: nn.Module, replaced: Iterable[Tensor] = ()) -> list[str]:
    """Return names of tensors that have no values after loading.

    Args:
        module: a loaded network.
        replaced: parameters of layers that compressed layers have replaced. Lists in attributes may
            still contain them; they are ignored.
    """
    ignored = {tensor.untyped_storage()._cdata for tensor in replaced if _has_storage(tensor)}
    tensors = dict((*module.named_parameters(), *module.named_buffers(), *plain_tensors(module)))
    return [
        name for name, tensor in tensors.items() if tensor.is_meta and not _is_in(tensor, ignored)
    ]


def tensors_on_accelerator(module: nn.Module) -> list[str]:
    """Return names of tensors that are on an accelerator."""
    tensors = dict((*module.named_parameters(), *module.named_buffers(), *plain_tensors(module)))
    return [name for name, tensor in tensors.items() if tensor.device.type not in ("cpu", "meta")]


def differing_tensors(first: nn.Module, second: nn.Module) -> list[str]:
    """Return names of plain tensors and non-persistent buffers that differ in two networks."""
    other = dict(plain_tensors(second))
    return [
        name
        for name, tensor in plain_tensors(first)
        if name not in other or not _are_equal_tensors(tensor, other[name])
    ]


def _construct_with_note(
    architecture: type[nn.Module],
    config: Mapping[str, Any],
    reason: str,
    limits: ConstructionLimits | None,
) -> Construction:
    """Build a network with its initial weights, and a note to the user that says why."""
    module, placement = _construct_on_cpu(architecture, config, limits)
    note = (
        f"{architecture.__name__} is built with all its weights in memory each time it is loaded, "
        f"because {reason}. Memory while loading is that of the weights, not of the file's pages."
    )
    return Construction(module, (note, *_correct_device_attributes(module, placement)))


def _construct_on_cpu(
    architecture: type[nn.Module],
    config: Mapping[str, Any],
    limits: ConstructionLimits | None = None,
) -> tuple[nn.Module, Placement]:
    """Build a network with its initial weights; also return the context it was built in."""
    try:
        with create_on_cpu(copy.copy(limits)) as placement:
            module = architecture(**decode_arguments(config))
    except TooLarge as error:
        raise ConstructionFailed("tensors_too_large", problem=str(error)) from error
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ConstructionFailed):
            raise
        raise _describe_failure(architecture, error) from error
    return module, placement


def _require_arguments(architecture: type[nn.Module], config: Mapping[str, Any]) -> None:
    """Raise if a configuration does not fit the class's keyword arguments."""
    signature = inspect.signature(architecture)
    try:
        signature.bind(**config)
    except TypeError as error:
        argument_names = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        raise ConstructionFailed(
            "arguments_wrong", problem=str(error), arguments=tuple(argument_names)
        ) from error


def _describe_failure(architecture: type[nn.Module], error: Exception) -> ConstructionFailed:
    """Build the error for a constructor that raised ``error``."""
    error_class, source_line = type(error).__name__, _describe_source_line(error)
    problem, name = (str(error).strip() or "no message").rstrip("."), architecture.__name__
    if any(word in problem for word in ("CUDA", "cuda", "NVIDIA", "accelerator")):
        return ConstructionFailed(
            "constructor_needs_gpu",
            error=error_class,
            place=source_line,
            problem=problem,
            architecture=name,
        )
    return ConstructionFailed(
        "constructor_raised",
        error=error_class,
        place=source_line,
        problem=problem,
        architecture=name,
    )


def _require_safe_names(architecture: type[nn.Module], module: nn.Module) -> None:
    """Raise for attribute names that could inject code into the source that torch generates.

    ``torch.fx`` writes an attribute path as ``getattr(self.tables, "name")`` without escaping the
    name, and runs that code (``torch/fx/graph.py``, ``_format_target``). Names often come from the
    configuration, which is untrusted: a class may use the name of each feature for its table.
    """
    for path, part in module.named_modules():
        for name in (*vars(part), *part._modules, *part._parameters, *part._buffers):
            if _UNSAFE_IN_TEXT.search(name):
                raise ConstructionFailed(
                    "attribute_name_unsafe",
                    name=name,
                    module=f"{architecture.__name__}.{path}".rstrip("."),
                )


def _describe_source_line(error: BaseException) -> str:
    """Describe the innermost line of the network's source code in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [frame for frame in frames if not frame.filename.startswith(_LIBRARY_FOLDERS)]
    if not user_frames:
        return "its call"
    frame = user_frames[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"{where}: {line}" if line else where


def _link_views(module: nn.Module, placement: Placement) -> None:
    """Make plain tensors views of the parameter whose previous memory they share.

    Moving a parameter to meta gives it new memory, so earlier views of it are no longer views.
    """
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


def _find_plain_tensors_without_values(module: nn.Module) -> list[str]:
    """Return names of plain tensors on meta that no loaded tensor will give values.

    They are views neither of a parameter nor of a buffer.
    """
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
    """Raise if plain tensors differ between two constructions, because no file stores them."""
    differing = [name for name in differing_tensors(first, second) if name in names]
    if differing:
        raise ModelRefused(
            "initial_weights_used",
            architecture=architecture.__name__,
            names=tuple(differing[:NAMES_SHOWN]),
            count=len(differing),
        )


def _are_equal_tensors(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same shape and values."""
    return first.shape == second.shape and bool(torch.equal(first, second))


def _correct_device_attributes(module: nn.Module, placement: Placement) -> tuple[str, ...]:
    """Set device attributes of a network to the CPU; return a note if it used another device."""
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
    changed_attributes = f" Set to 'cpu': {_list_names(changed)}." if changed else ""
    return (
        f"The constructor places the network on {names}; recpress builds it on the CPU and decides "
        f"the device itself.{changed_attributes}",
    )


def _share_memory(tensor: Tensor) -> Tensor:
    """Create another tensor object with the same memory."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()


def _find_computed_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield weights that hooks of ``torch.nn.utils`` compute from parameters before each forward.

    Yields the weight's name, its module and the hook (weight norm, spectral norm or pruning).
    """
    for name, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                yield f"{name}.{hook.name}".removeprefix("."), part, hook
            elif isinstance(hook, BasePruningMethod):
                yield f"{name}.{hook._tensor_name}".removeprefix("."), part, hook


@torch.no_grad()
def _recompute_weights(module: nn.Module) -> None:
    """Compute the weights of ``_find_computed_weights`` from the loaded parameters.

    Spectral norm uses its stored vectors, without a power iteration.
    """
    for name, part, hook in _find_computed_weights(module):
        if isinstance(hook, BasePruningMethod):
            weight = hook.apply_mask(part)  # type: ignore[no-untyped-call]
        elif isinstance(hook, SpectralNorm):
            weight = hook.compute_weight(part, do_power_iteration=False)
        else:
            weight = hook.compute_weight(part)
        setattr(part, name.rpartition(".")[2], weight)


def tensor_named(module: nn.Module, name: str) -> Tensor:
    """Return the tensor at an attribute path."""
    parent_name, _, attribute = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    # A compressed table has a property of the name ``weight`` that is not its stored tensor.
    stored = parent._parameters.get(attribute, parent._buffers.get(attribute))
    return cast("Tensor", getattr(parent, attribute) if stored is None else stored)


def _has_storage(tensor: Tensor) -> bool:
    """Return whether a tensor has memory that a view can share; sparse and lazy ones have none."""
    return tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor)


def _is_in(tensor: Tensor, storages: Container[int]) -> bool:
    """Return whether a tensor's memory is one of these storages, given by their addresses."""
    return _has_storage(tensor) and tensor.untyped_storage()._cdata in storages


def _list_names(names: list[str]) -> str:
    """Format the first names and the number of others."""
    remaining = len(names) - NAMES_SHOWN
    ending = f" and {remaining} more" if remaining > 0 else ""
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + ending
