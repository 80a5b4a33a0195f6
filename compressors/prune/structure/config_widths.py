"""Find the numbers of a configuration that are widths of layers.

A bundle stores a network as its class and the keyword arguments of its constructor, so a layer can
become narrower only if one number of those arguments is its width. To find that number, change it,
build the network without its weights, and compare the shapes.

A number counts channels or groups of channels: with ``heads`` and ``head_dim`` in the
configuration, each head is ``head_dim`` channels of three layers. A *unit* is one channel or one
group that the number counts.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressors.contracts import is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.factored import FactoredLinear
from compressors.core.modules.formats import FoldedNorm, PackedLinear
from compressors.core.state.construction import construct
from compressors.errors.widths import NotAWidth, NotProportional

Path = tuple[str | int, ...]
Shapes = dict[str, torch.Size]
STEPS = (8, 1)  # a multiple of 8 first: widths are often split among heads


@dataclass(frozen=True)
class Width:
    """A number of the configuration, and the layers whose shapes depend on it.

    ``makers`` are the dense layers whose outputs it counts, each with its channels per unit: 1 if
    the number is the layer's width, the size of a head if it counts heads. ``readers`` gives, for
    each module that consumes those channels, the number of its inputs per unit.
    """

    path: Path
    value: int
    makers: dict[str, int]
    readers: dict[str, int]

    def description(self) -> str:
        """The number as it is written in code, such as ``hidden[0]``."""
        return describe_path(self.path)


def describe_path(path: Path) -> str:
    """Format a path in a configuration as it is written in code, such as ``hidden[0]``."""
    first, *rest = path
    return str(first) + "".join(f"[{part!r}]" for part in rest)


def defaults_of(architecture: type[nn.Module]) -> dict[str, Any]:
    """The defaults of the constructor's arguments that a configuration may set."""
    return {
        name: _listed(parameter.default)
        for name, parameter in inspect.signature(architecture).parameters.items()
        if parameter.default is not inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _listed(value: Any) -> Any:
    """Convert tuples to lists, as in JSON, so that one element can be replaced."""
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def with_value(
    architecture: type[nn.Module], config: Mapping[str, Any], path: Path, value: Any
) -> dict[str, Any]:
    """Return the configuration with one value replaced and the other arguments unchanged.

    A default of the class is written out only if a number in it is replaced.
    """
    first = path[0]
    changed: dict[Any, Any] = copy.deepcopy(dict(config))
    if first not in changed:
        changed[first] = copy.deepcopy(defaults_of(architecture)[str(first)])
    place: Any = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    result: dict[str, Any] = changed
    return result


def find_widths(model: Model) -> tuple[dict[str, Width], dict[str, tuple[Reason, ...]]]:
    """Find the numbers that set layers' output widths; give reasons for the layers without one.

    The numbers are keyed by their descriptions. The cost is two or three builds without weights for
    each number that divides a layer's width.
    """
    linear = {
        name: layer.out_features
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear | PackedLinear)
    }
    config = model.network.architecture.config
    before = shapes_of(model.architecture, config)
    widths: dict[str, Width] = {}
    reasons: dict[str, tuple[Reason, ...]] = {}
    splits: dict[str, int] = {}
    for path, value in numbers({**defaults_of(model.architecture), **config}):
        divides = any(outputs % value == 0 for outputs in linear.values()) if value > 1 else False
        if before is None or not divides:
            continue
        try:
            width = _width(model, before, path, value)
        except NotAWidth as fault:
            # The reason for the layers of that width, unless another number is their width.
            refused = {n: (fault.reason,) for n, outputs in linear.items() if outputs == value}
            reasons = {**refused, **reasons}
            if isinstance(fault, NotProportional):
                splits[describe_path(path)] = value
            continue
        widths[describe_path(path)] = width
    for name, outputs in linear.items():
        default = Reason("no_width_argument", outputs=outputs)
        reasons.setdefault(name, (Reason("one_output") if outputs == 1 else default,))
        for number, value in splits.items():
            if outputs > value and outputs % value == 0:
                reasons[name] = (*reasons[name], Reason("split_width", argument=number))
    taken = {maker for width in widths.values() for maker in width.makers}
    return widths, {name: why for name, why in reasons.items() if name not in taken}


def _width(model: Model, before: Shapes, path: Path, value: int) -> Width:
    architecture, config = model.architecture, model.network.architecture.config
    first_name = {module: name for name, module in reversed(_every(model.module))}
    built = 0
    for step in STEPS:
        after = shapes_of(architecture, with_value(architecture, config, path, value + step))
        built += after is not None
        if after is not None and after.keys() == before.keys():
            break
    else:
        why = Reason("width_not_built")
        raise NotAWidth(why) if built else NotProportional(why)
    makers: dict[str, int] = {}
    readers: dict[str, int] = {}
    for name, shape in before.items():
        if after[name] == shape:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.module.get_submodule(owner)
        if isinstance(module, FoldedNorm):  # the built norm has parameters, this one none
            continue
        owner = first_name[module]  # a module with two names is listed by the first
        if isinstance(module, PackedLinear):
            already = Reason("prune_before_quantizing", module=owner, format=module.storage.name)
            raise NotAWidth(already)
        if isinstance(module, FactoredLinear):
            raise NotAWidth(Reason("prune_before_factorizing", module=owner))
        if not isinstance(module, nn.Linear | nn.BatchNorm1d | nn.PReLU):
            raise NotAWidth(Reason("size_of_other", argument=describe_path(path), module=owner))
        grown = [new - old for old, new in zip(shape, after[name], strict=True)]
        if isinstance(module, nn.Linear) and leaf == "weight":
            in_step = not grown[0] or grown[0] * value == step * shape[0]
            if not in_step or grown[0] % step or grown[1] % step:
                unlike = Reason("grows_differently", module=owner, argument=describe_path(path))
                raise NotProportional(unlike)
            if grown[0]:
                makers[owner] = grown[0] // step
            if grown[1]:
                readers[owner] = grown[1] // step
        elif not isinstance(module, nn.Linear):
            readers[owner] = grown[0] // step
    if not makers or not readers:
        why = Reason("not_between_layers", argument=describe_path(path))
        raise NotAWidth(why) if makers or readers else NotProportional(why)
    return Width(path, value, makers, readers)


def _every(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def numbers(value: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield every integer of a configuration with its path."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from numbers(item, (*path, place))


def shapes_of(architecture: type[nn.Module], config: Mapping[str, Any]) -> Shapes | None:
    """The shapes of a network's tensors, or None if it cannot be built with the configuration."""
    try:
        module = construct(architecture, config).module
    except Exception as fault:  # any exception of the class means: the number is fixed
        if is_out_of_memory(fault):
            raise
        return None
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
