"""Find the numbers of a configuration that are widths of layers.

A bundle stores a network as its class and the keyword arguments of its constructor, so a layer can
become narrower only if one number among those arguments (the *configuration*) is its width. To find
that number, this module changes each number, builds the network without its weights, and compares
the shapes of the tensors.

A number counts channels or groups of channels: with ``heads`` and ``head_dim`` in the
configuration, each head is ``head_dim`` channels of three layers. A *unit* is one channel or one
group that the number counts. A *maker* is a dense layer that outputs the channels, a *reader* is a
module that consumes them.
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
INCREASES = (8, 1)  # 8 first: a width that is split among heads needs a multiple of their number


@dataclass(frozen=True)
class Width:
    """A number of the configuration, and the layers whose shapes depend on it.

    Attributes:
        path: where the number is in the configuration.
        value: the number: how many units the layers have.
        makers: the dense layers whose outputs it counts, each with its channels per unit: 1 if the
            number is the layer's width, the size of a head if it counts heads.
        readers: the modules that consume these channels, each with its inputs per unit.
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
    """The defaults of the constructor arguments that a configuration may set, by name."""
    return {
        name: _as_lists(parameter.default)
        for name, parameter in inspect.signature(architecture).parameters.items()
        if parameter.default is not inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _as_lists(value: Any) -> Any:
    """Convert tuples to lists, as in JSON, so that one element can be replaced."""
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


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
    container: Any = changed
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    result: dict[str, Any] = changed
    return result


def find_widths(model: Model) -> tuple[dict[str, Width], dict[str, tuple[Reason, ...]]]:
    """Find the numbers that set layers' output widths; give reasons for the layers without one.

    The cost is two or three builds without weights for each number that divides a layer's width.

    Returns:
        The widths by their description (such as ``hidden[0]``), and the reasons by layer name.
    """
    output_widths = {
        name: layer.out_features
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear | PackedLinear)
    }
    config = model.network.architecture.config
    before = shapes_of(model.architecture, config)
    widths: dict[str, Width] = {}
    reasons: dict[str, tuple[Reason, ...]] = {}
    not_proportional: dict[str, int] = {}
    for path, value in integers_of({**defaults_of(model.architecture), **config}):
        divides = value > 1 and any(outputs % value == 0 for outputs in output_widths.values())
        if before is None or not divides:
            continue
        try:
            width = _width(model, before, path, value)
        except NotAWidth as fault:
            # The reason for the layers of that width, unless another number is their width.
            refused = {
                name: (fault.reason,) for name, outputs in output_widths.items() if outputs == value
            }
            reasons = {**refused, **reasons}
            if isinstance(fault, NotProportional):
                not_proportional[describe_path(path)] = value
            continue
        widths[describe_path(path)] = width
    for name, outputs in output_widths.items():
        default = Reason("no_width_argument", outputs=outputs)
        reasons.setdefault(name, (Reason("one_output") if outputs == 1 else default,))
        for argument, value in not_proportional.items():
            if outputs > value and outputs % value == 0:
                reasons[name] = (*reasons[name], Reason("split_width", argument=argument))
    makers = {maker for width in widths.values() for maker in width.makers}
    return widths, {name: why for name, why in reasons.items() if name not in makers}


def _width(model: Model, before: Shapes, path: Path, value: int) -> Width:
    """Find the layers whose shapes depend on one number of the configuration.

    Args:
        model: the network; it is not changed.
        before: the shapes of its tensors.
        path: where the number is in the configuration.
        value: the number.

    Raises:
        NotProportional: no layer grows in proportion to the number, or no network with a larger
            number can be built.
        NotAWidth: the number is a size of something other than dense layers and norms, or a layer
            of that width is already compressed.
    """
    architecture, config = model.architecture, model.network.architecture.config
    modules = list(model.module.named_modules(remove_duplicate=False))
    first_name = {module: name for name, module in reversed(modules)}
    was_built = False
    for increase in INCREASES:
        after = shapes_of(architecture, with_value(architecture, config, path, value + increase))
        was_built |= after is not None
        if after is not None and after.keys() == before.keys():
            break
    else:
        why = Reason("width_not_built")
        raise NotAWidth(why) if was_built else NotProportional(why)
    makers: dict[str, int] = {}
    readers: dict[str, int] = {}
    for name, shape in before.items():
        if after[name] == shape:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.module.get_submodule(owner)
        if isinstance(module, FoldedNorm):  # the class builds a norm with parameters here
            continue
        owner = first_name[module]  # a module with two names is listed under the first
        if isinstance(module, PackedLinear):
            quantized = Reason("prune_before_quantizing", module=owner, format=module.storage.name)
            raise NotAWidth(quantized)
        if isinstance(module, FactoredLinear):
            raise NotAWidth(Reason("prune_before_factorizing", module=owner))
        if not isinstance(module, nn.Linear | nn.BatchNorm1d | nn.PReLU):
            raise NotAWidth(Reason("size_of_other", argument=describe_path(path), module=owner))
        grown = [new - old for old, new in zip(shape, after[name], strict=True)]
        if isinstance(module, nn.Linear) and leaf == "weight":
            is_proportional = not grown[0] or grown[0] * value == increase * shape[0]
            if not is_proportional or grown[0] % increase or grown[1] % increase:
                reason = Reason("grows_differently", module=owner, argument=describe_path(path))
                raise NotProportional(reason)
            if grown[0]:
                makers[owner] = grown[0] // increase
            if grown[1]:
                readers[owner] = grown[1] // increase
        elif not isinstance(module, nn.Linear):
            readers[owner] = grown[0] // increase
    if not makers or not readers:
        why = Reason("not_between_layers", argument=describe_path(path))
        raise NotAWidth(why) if makers or readers else NotProportional(why)
    return Width(path, value, makers, readers)


def integers_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield every integer of a configuration with its path."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from integers_of(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from integers_of(item, (*path, index))


def shapes_of(architecture: type[nn.Module], config: Mapping[str, Any]) -> Shapes | None:
    """The shapes of a network's tensors, or None if it cannot be built with the configuration."""
    try:
        module = construct(architecture, config).module
    except Exception as fault:  # any exception of the class means: the number is fixed
        if is_out_of_memory(fault):
            raise
        return None
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
