"""Find layers whose number is in the configuration, and build the network without one of them.

A number such as ``cross_layers``, or a list such as ``hidden``, is found by a build with one less:
the lists and sequences of modules that become shorter are the layers that it counts. Any member may
be removed if the remaining ones fit the shapes that the class then builds; later members move up by
one. A check shows that nothing else depends on the member: the shorter network must give the same
scores as the old one with that member skipped. A skipped member either returns its input (a block,
a hidden layer) or adds zero (a residual part, a cross layer).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.state.construction import construct
from compressors.core.units import private_copy, table_rows
from compressors.errors.widths import NotAMember
from compressors.prune.structure.config_widths import (
    Path,
    defaults_of,
    describe_path,
    numbers,
    with_value,
)
from compressors.prune.structure.narrowing import gap_of, made_up_scores, rebuilt, rounded_scores


@dataclass(frozen=True)
class Stack:
    """Layers that a number or a list of the configuration counts.

    ``parts`` are the containers of these layers, each with the number of consecutive modules that
    form one member.
    """

    path: Path
    members: int
    listed: bool
    parts: dict[str, int]

    def description(self) -> str:
        """The number or list as it is written in code, such as ``hidden``."""
        return describe_path(self.path)

    def member_of(self, name: str) -> int | None:
        """The member that a module or tensor belongs to, or None."""
        for part, size in self.parts.items():
            place, _, _ = name.removeprefix(f"{part}.").partition(".")
            if name.startswith(f"{part}.") and place.isdecimal():
                member = int(place) // size
                return member if member < self.members else None
        return None

    def moved(self, name: str, gone: int) -> str | None:
        """The name of a module or tensor after member ``gone`` is removed; None if it was in it."""
        for part, size in self.parts.items():
            place, dot, rest = name.removeprefix(f"{part}.").partition(".")
            if not name.startswith(f"{part}.") or not place.isdecimal():
                continue
            if int(place) // size == gone:
                return None
            after = int(place) - size * (int(place) // size > gone)
            return f"{part}.{after}{dot}{rest}"
        return name


def find_stacks(model: Model) -> tuple[Stack, ...]:
    """Find the numbers and lists that set the length of containers, with one build for each."""
    before = _lengths(model.module)
    config = {**defaults_of(model.architecture), **model.network.architecture.config}
    stacks = []
    for path, members, listed in _counted(config):
        shorter = Stack(path, members, listed, {})
        try:
            after = _lengths(_built(model, _config(model, shorter, members - 1)))
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            continue
        parts = {
            name: size - after[name]
            for name, size in before.items()
            if after.get(name, size) < size and (size - after[name]) * members <= size
        }
        outermost = {
            name: size
            for name, size in parts.items()
            if not any(name.startswith(f"{other}.") for other in parts)
        }
        if outermost:
            stacks.append(replace(shorter, parts=outermost))
    return tuple(stacks)


def _counted(config: Any, path: Path = ()) -> Iterator[tuple[Path, int, bool]]:
    """Yield numbers of at least 2 and lists of at least two numbers, with their paths."""
    for place, value in numbers(config, path):
        if value >= 2:
            yield place, value, False
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, list) and len(value) >= 2 and all(type(v) is int for v in value):
            yield (*path, key), len(value), True
        elif isinstance(value, dict | list):
            for found in _counted(value, (*path, key)):
                if found[2]:
                    yield found


def _lengths(module: nn.Module) -> dict[str, int]:
    return {
        name: len(part)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential)
    }


def _config(model: Model, stack: Stack, gone: int) -> dict[str, Any]:
    """The configuration after one member is removed."""
    config = model.network.architecture.config
    if not stack.listed:
        return with_value(model.architecture, config, stack.path, stack.members - 1)
    value: Any = {**defaults_of(model.architecture), **config}
    for part in stack.path:
        value = value[part]
    return with_value(model.architecture, config, stack.path, [*value[:gone], *value[gone + 1 :]])


def _built(model: Model, config: dict[str, Any]) -> nn.Module:
    return construct(model.architecture, config).module


def without_member(
    model: Model, signature: Signature, stack: Stack, gone: int
) -> tuple[Model, Stack]:
    """Build the network without one member over the same tensors; also return the shorter stack.

    Raises:
        NotAMember: the remaining tensors do not fit the shapes of the shorter network, or its
            scores differ from those of the old network with that member skipped.
    """
    config = _config(model, stack, gone)
    try:
        built = rebuilt(model, config, lambda name: stack.moved(name, gone))
    except Exception as fault:  # any exception of the class means: the member is needed
        if is_out_of_memory(fault):
            raise
        first = str(fault).strip().splitlines()[-1].strip()
        raise NotAMember(Reason("rest_does_not_fit", layer=gone, fault=first)) from fault
    architecture = model.network.architecture.model_copy(update={"config": config})
    network = model.network.model_copy(update={"architecture": architecture})
    shorter = replace(model, module=built, network=network)
    _require_skipped(model, shorter, signature, stack, gone)
    return shorter, replace(stack, members=stack.members - 1)


def _require_skipped(
    model: Model, shorter: Model, signature: Signature, stack: Stack, gone: int
) -> None:
    tables = table_rows(model.module)
    scores = made_up_scores(shorter.module, signature, tables)
    gaps = []
    for instead in (_its_input, _nothing):
        skipping = private_copy(model.module).eval()
        try:
            with _replaced(skipping, stack, gone, instead):
                gap = gap_of(
                    scores,
                    made_up_scores(skipping, signature, tables),
                    signature,
                    lambda: rounded_scores(shorter.module, signature, tables),
                )
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            continue
        if gap is None:
            return
        gaps.append(gap)
    if gaps:
        raise NotAMember(Reason("not_the_skipping_network", layer=gone, gap=gaps[0]))
    raise NotAMember(Reason("cannot_be_skipped", layer=gone))


def _its_input(args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if args[0].shape != output.shape:
        raise ValueError("another shape")
    return args[0]


def _nothing(args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


@contextmanager
def _replaced(
    module: nn.Module,
    stack: Stack,
    member: int,
    instead: Callable[[tuple[Tensor, ...], Tensor], Tensor],
) -> Iterator[None]:
    """Replace the output of every module of a member."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return instead(args, output)

    with ExitStack() as hooks:
        for name, size in stack.parts.items():
            children = list(module.get_submodule(name).children())
            for part in children[member * size : (member + 1) * size]:
                hooks.callback(part.register_forward_hook(hook).remove)
        yield
