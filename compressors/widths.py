"""Which number of a configuration is the width of which layers, and who reads each channel.

A bundle stores a network as its class and the keyword arguments it is built with, so a narrower
layer exists only if some number of those arguments says how wide it is. That number is found by
trying: change it, build the network without its weights, and see which shapes followed.

Who reads a channel is found by trying too. Each row of a batch gets a NaN in one channel of a
layer's output; products cut the trace off (every layer's own output is cleaned), so the columns
where a NaN arrives are those that read that channel directly: through activations, norms of
single channels, concatenations, residual sums. Whatever mixes channels otherwise (a layer norm, a
softmax, a sum) spreads the NaN, and the width is refused with that reason. Dependency graphs of
autograd (Fang et al. 2023, https://arxiv.org/abs/2301.12900) answer the same question from the
operators' names; ours asks the network itself, and misses nothing that a concatenation moves.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.batches import example
from compressors.contracts import Schema
from compressors.factored import FactoredLinear
from compressors.formats import FoldedNorm, PackedLinear
from compressors.meta import parameters_on_meta
from compressors.model import Model

Path = tuple[str | int, ...]
Shapes = dict[str, torch.Size]
TRACED = 128  # channels at a time: each is a row through the whole network
STEPS = (8, 1)  # a multiple of 8 first: widths are often split among heads


@dataclass(frozen=True)
class Width:
    """A number of the configuration, and the layers that follow it.

    ``makers`` are the dense layers with that many outputs. ``readers`` hold, for each module
    that reads their channels, how many of its inputs there are per channel.
    """

    path: Path
    value: int
    makers: tuple[str, ...]
    readers: dict[str, int]

    def spoken(self) -> str:
        """The number as people would write it: ``hidden[0]``."""
        first, *rest = self.path
        return str(first) + "".join(f"[{part!r}]" for part in rest)


@dataclass(frozen=True)
class Channels:
    """Who reads the channels of one width.

    ``reads`` holds, by maker and reader, bool ``(channels, inputs of the reader)``. ``tied`` are
    the makers whose channels meet (a residual sum, a gate): they keep the same ones.
    """

    width: Width
    reads: dict[tuple[str, str], Tensor]
    tied: tuple[tuple[str, ...], ...]


class NotAWidth(Exception):
    """Why a layer cannot become narrower; half a sentence."""


def defaults_of(architecture: type[nn.Module]) -> dict[str, Any]:
    """The class's own defaults for arguments that a configuration may name."""
    return {
        name: _listed(parameter.default)
        for name, parameter in inspect.signature(architecture).parameters.items()
        if parameter.default is not inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _listed(value: Any) -> Any:
    """Tuples as the lists that JSON knows, so that a part of one can be replaced."""
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def with_value(
    architecture: type[nn.Module], config: Mapping[str, Any], path: Path, value: int
) -> dict[str, Any]:
    """The configuration with one number replaced; other arguments stay as they are written.

    A default of the class is written out only where a number of it is replaced.
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


def find_widths(model: Model) -> tuple[dict[str, Width], dict[str, str]]:
    """The width that each dense layer's outputs follow, and why the other layers have none.

    Cost: two or three builds without weights per number that equals a layer's width.
    """
    linear = {
        name: layer.out_features
        for name, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear | PackedLinear)
    }
    config = model.network.architecture.config
    before = _shapes(model.architecture, config)
    found: dict[str, Width] = {}
    reasons: dict[str, str] = {}
    for path, value in _numbers({**defaults_of(model.architecture), **config}, ()):
        if before is None or value < 2 or value not in linear.values():
            continue
        try:
            width = _width(model, before, path, value)
        except NotAWidth as why:
            # Said of the layers of that width, unless another number turns out to be theirs.
            said = {name: str(why) for name, outputs in linear.items() if outputs == value}
            reasons = {**said, **reasons}
            continue
        found.update(dict.fromkeys(width.makers, width))
    for name, outputs in linear.items():
        default = f"no number of the architecture's configuration is its width {outputs}"
        reasons.setdefault(name, "has a single output" if outputs == 1 else default)
    return found, {name: why for name, why in reasons.items() if name not in found}


def _width(model: Model, before: Shapes, path: Path, value: int) -> Width:
    architecture, config = model.architecture, model.network.architecture.config
    first_name = {module: name for name, module in reversed(_every(model.module))}
    for step in STEPS:
        after = _shapes(architecture, with_value(architecture, config, path, value + step))
        if after is not None and after.keys() == before.keys():
            break
    else:
        raise NotAWidth("another width does not build")
    makers: list[str] = []
    readers: dict[str, int] = {}
    for name, shape in before.items():
        if after[name] == shape:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.module.get_submodule(owner)
        if isinstance(module, FoldedNorm):  # the class builds it with numbers, here it has none
            continue
        owner = first_name[module]  # a module in two places goes by the first
        if isinstance(module, PackedLinear):
            raise NotAWidth(f"{owner!r} is already {module.storage.name}: prune before quantizing")
        if isinstance(module, FactoredLinear):
            raise NotAWidth(f"{owner!r} is already factored: prune before factorizing")
        if not isinstance(module, nn.Linear | nn.BatchNorm1d | nn.PReLU):
            raise NotAWidth(f"{_spoken(path)} is also a size of {owner!r}")
        grown = [new - old for old, new in zip(shape, after[name], strict=True)]
        if isinstance(module, nn.Linear) and leaf == "weight":
            if grown[0] not in (0, step) or grown[1] % step:
                raise NotAWidth(f"{owner!r} grows by other than {_spoken(path)} does")
            if grown[0] and owner not in makers:
                makers.append(owner)
            if grown[1]:
                readers[owner] = grown[1] // step
        elif not isinstance(module, nn.Linear):
            readers[owner] = grown[0] // step
    if not makers or not readers:
        raise NotAWidth(f"{_spoken(path)} is not the width between two layers")
    return Width(path, value, tuple(makers), readers)


def _every(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def _spoken(path: Path) -> str:
    return Width(path, 0, (), {}).spoken()


def _numbers(value: Any, path: Path) -> Iterator[tuple[Path, int]]:
    """Every whole number of a configuration with its place."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _numbers(item, (*path, place))


def _shapes(architecture: type[nn.Module], config: Mapping[str, Any]) -> Shapes | None:
    """The shapes of a network's tensors, or None where it cannot be built like that."""
    try:
        with parameters_on_meta():
            module = architecture(**copy.deepcopy(dict(config)))  # a class may change a list
    except Exception:  # whatever a class raises, it says that this number is not free
        return None
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def trace(
    module: nn.Module, schema: Schema, rows_of_table: dict[str, int], width: Width
) -> Channels:
    """Who reads each channel of a width.

    Raises:
        NotAWidth: something but dense layers mixes the channels, or a layer of unchanging width
            reads them.
    """
    reads: dict[tuple[str, str], Tensor] = {}
    for maker in width.makers:
        parts: dict[str, dict[int, Tensor]] = {}
        for begin in range(0, width.value, TRACED):
            rows = min(TRACED, width.value - begin)  # a row a channel
            inputs = example(schema, rows_of_table, rows)
            with torch.no_grad(), _traced(module, maker, width.value, begin, rows) as seen:
                score = module(**inputs)
            if bool(score.isnan().any()):
                raise NotAWidth(f"the channels of {maker!r} reach the score without a dense layer")
            for reader, columns in seen.items():
                parts.setdefault(reader, {})[begin] = columns
        for reader, held in parts.items():
            columns = torch.cat(list(held.values()))
            if len(columns) < width.value:  # called for some rows and not for others
                raise NotAWidth(f"{reader!r} is not called every time")
            if not bool(columns.any()):
                continue
            each = columns.sum(dim=1)  # (channels,)
            if reader not in width.readers:
                raise NotAWidth(f"{reader!r} mixes the channels of {maker!r}")
            if bool((each != each[0]).any()) or bool((columns.sum(dim=0) > 1).any()):
                raise NotAWidth(f"the channels of {maker!r} are mixed on their way to {reader!r}")
            reads[maker, reader] = columns
    for reader, per_channel in width.readers.items():
        arrived = [columns for (_, name), columns in reads.items() if name == reader]
        together = torch.stack(arrived).any(dim=0) if arrived else torch.zeros(1, 1)
        if int(together.sum()) != per_channel * width.value or not arrived:
            raise NotAWidth(f"not all inputs of {reader!r} come from channels of one layer")
    return Channels(width, reads, _tied(width, reads))


@contextmanager
def _traced(
    module: nn.Module, maker: str, channels: int, begin: int, rows: int
) -> Iterator[dict[str, Tensor]]:
    """Inside, row r carries a NaN in channel ``begin + r`` of ``maker``; yields who sees it."""
    seen: dict[str, Tensor] = {}

    def reading(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            if len(x) != rows:
                if bool(x.isnan().any()):
                    raise NotAWidth(f"{name!r} is not called with a row a row")
                return
            columns = x.isnan().reshape(len(x), -1, x.shape[-1]).any(dim=1)
            seen[name] = seen[name] | columns if name in seen else columns

        return hook

    def marking(_: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        if len(output) != rows or output.shape[-1] != channels:
            raise NotAWidth(f"{maker!r} does not answer a row a row")
        marked = output.clone()
        each = torch.arange(rows)
        marked[each, ..., begin + each] = torch.nan
        return marked

    def cleaning(_: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        return output.nan_to_num(nan=0.0)

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | PackedLinear):
                hooks.callback(
                    part.register_forward_pre_hook(reading(name), with_kwargs=True).remove
                )
                after = marking if name == maker else cleaning
                hooks.callback(part.register_forward_hook(after).remove)
            elif isinstance(part, nn.BatchNorm1d) or (
                isinstance(part, nn.PReLU) and part.num_parameters > 1
            ):
                hooks.callback(
                    part.register_forward_pre_hook(reading(name), with_kwargs=True).remove
                )
        yield seen


def _tied(width: Width, reads: Mapping[tuple[str, str], Tensor]) -> tuple[tuple[str, ...], ...]:
    """Makers whose channels arrive at the same inputs, one group each.

    Raises:
        NotAWidth: they meet, but not channel by channel.
    """
    groups = [{maker} for maker in width.makers]
    for (first, reader), columns in reads.items():
        for (second, other), others in reads.items():
            if first == second or reader != other or not bool((columns & others).any()):
                continue
            if not torch.equal(columns, others):
                raise NotAWidth(f"{first!r} and {second!r} meet in {reader!r} out of step")
            mine = next(group for group in groups if first in group)
            theirs = next(group for group in groups if second in group)
            if mine is not theirs:
                groups.remove(theirs)
                mine |= theirs
    return tuple(tuple(sorted(group)) for group in groups)
