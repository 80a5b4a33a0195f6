"""Find the numbers of a configuration that are widths of layers.

A bundle stores a network as its class and the keyword arguments of its constructor, so a layer can
become narrower only if one number among those arguments (the *configuration*) is its width. To find
that number, this module changes each number, builds the network without its weights, and compares
the shapes of the tensors.

A number counts channels or groups of channels: with ``heads`` and ``head_dim`` in the
configuration, each head is ``head_dim`` channels of three layers. In this file a *group* is what
the number counts: one channel, or all channels of a head. A *producer* is a dense layer that
outputs the channels, a *consumer* is a layer or norm that takes them as inputs.

``PackedLinear`` and ``FactoredLinear`` are quantized and low-rank replacements of ``nn.Linear``.
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
"""Argument name, keys and indices of a value in a configuration, such as ``("hidden", 0)``."""
Shapes = dict[str, torch.Size]
"""The shapes of a network's tensors, by name."""
INCREASES = (8, 1)  # 8 first: a width that is split among heads needs a multiple of their number


@dataclass(frozen=True)
class Width:
    """A number of the configuration, and the layers whose shapes depend on it.

    Attributes:
        path: where the number is in the configuration.
        value: the number: how many groups the layers have.
        producers: by name, the dense layers whose outputs it counts, each with its channels per
            group: 1 if the number is the layer's width, the size of a head if it counts heads.
        consumers: by name, the layers and norms that take these channels as inputs, each with its
            inputs per group.
    """

    path: Path
    value: int
    producers: dict[str, int]
    consumers: dict[str, int]

    def description(self) -> str:
        """Return the number's place as it is written in code, such as ``hidden[0]``."""
        return describe_path(self.path)


def describe_path(path: Path) -> str:
    """Format a path in a configuration as it is written in code, such as ``hidden[0]``."""
    first, *rest = path
    return str(first) + "".join(f"[{part!r}]" for part in rest)


def find_defaults(architecture: type[nn.Module]) -> dict[str, Any]:
    """Return the defaults of the constructor arguments that a configuration may set, by name."""
    return {
        name: _convert_tuples_to_lists(parameter.default)
        for name, parameter in inspect.signature(architecture).parameters.items()
        if parameter.default is not inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _convert_tuples_to_lists(value: Any) -> Any:
    """Convert tuples to lists, as in JSON, so that one element can be replaced."""
    return (
        [_convert_tuples_to_lists(item) for item in value]
        if isinstance(value, list | tuple)
        else value
    )


def replace_value(
    architecture: type[nn.Module], config: Mapping[str, Any], path: Path, value: Any
) -> dict[str, Any]:
    """Return the configuration with one value replaced and the other arguments unchanged.

    If the value is inside a default of the class, the default is copied into the configuration.
    """
    argument = path[0]
    changed: dict[Any, Any] = copy.deepcopy(dict(config))
    if argument not in changed:
        changed[argument] = copy.deepcopy(find_defaults(architecture)[str(argument)])
    container: Any = changed
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    result: dict[str, Any] = changed
    return result


def find_widths(model: Model) -> tuple[dict[str, Width], dict[str, tuple[Reason, ...]]]:
    """Find the numbers that set layers' output widths; give reasons for the layers without one.

    For each number that divides a layer's width, the network is built once or twice without values
    of its weights.

    Returns:
        The widths by their description (such as ``hidden[0]``), and the reasons by layer name.
    """
    output_widths = {
        name: layer.out_features
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear | PackedLinear)
    }
    config = model.network.architecture.config
    before = find_shapes(model.architecture, config)
    widths: dict[str, Width] = {}
    reasons: dict[str, tuple[Reason, ...]] = {}
    # Numbers with which no layer grows in proportion, such as a number of heads that split a width.
    not_proportional: dict[str, int] = {}
    for path, value in iterate_integers({**find_defaults(model.architecture), **config}):
        divides = value > 1 and any(outputs % value == 0 for outputs in output_widths.values())
        if before is None or not divides:
            continue
        try:
            width = _find_width(model, before, path, value)
        except NotAWidth as fault:
            # The reason applies to the layers of that width, unless another number sets their
            # width.
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
    producers = {producer for width in widths.values() for producer in width.producers}
    return widths, {name: why for name, why in reasons.items() if name not in producers}


def _find_width(model: Model, before: Shapes, path: Path, value: int) -> Width:
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
        after = find_shapes(
            architecture, replace_value(architecture, config, path, value + increase)
        )
        was_built |= after is not None
        if after is not None and after.keys() == before.keys():
            break
    else:
        why = Reason("width_not_built")
        raise NotAWidth(why) if was_built else NotProportional(why)
    producers: dict[str, int] = {}
    consumers: dict[str, int] = {}
    for name, shape in before.items():
        if after[name] == shape:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.module.get_submodule(owner)
        # A folded norm has no parameters; the network built from the class has a norm with them.
        if isinstance(module, FoldedNorm):
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
                producers[owner] = grown[0] // increase
            if grown[1]:
                consumers[owner] = grown[1] // increase
        elif not isinstance(module, nn.Linear):
            consumers[owner] = grown[0] // increase
    if not producers or not consumers:
        why = Reason("not_between_layers", argument=describe_path(path))
        raise NotAWidth(why) if producers or consumers else NotProportional(why)
    return Width(path, value, producers, consumers)


def iterate_integers(value: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield every integer of a configuration with its path."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from iterate_integers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from iterate_integers(item, (*path, index))


def find_shapes(architecture: type[nn.Module], config: Mapping[str, Any]) -> Shapes | None:
    """Return the shapes of a network's tensors; None if the configuration does not build it."""
    try:
        module = construct(architecture, config).module
    except Exception as fault:  # any exception of the class means: the number is fixed
        if is_out_of_memory(fault):
            raise
        return None
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
