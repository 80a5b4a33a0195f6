"""Find layers that an argument of the model class counts, and build the network without one.

The configuration of a bundle holds the arguments of the model class. To find out whether a number
such as ``cross_layers``, or a list such as ``hidden``, counts layers, the network is built with one
layer less. The containers (``nn.ModuleList``, ``nn.Sequential``) that become shorter hold the
counted layers, which form a *stack*. A *member* of the stack is the set of modules that disappear
with one layer less, such as a Linear and its norm.

A member may be removed if the remaining ones fit the shapes that the class then builds; the index
of each later member decreases by one. A check shows that nothing else depends on the member: the
shorter network must give the same scores as the old one with that member skipped. A skipped member
either returns its input (a block, a hidden layer) or zeros (a residual part, a cross layer).
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
    describe_path,
    find_defaults,
    iterate_integers,
    replace_value,
)
from compressors.prune.structure.narrowing import (
    describe_score_difference,
    rebuild,
    rounded_scores,
    synthetic_scores,
)


@dataclass(frozen=True)
class Stack:
    """Layers that a number or a list of the configuration counts.

    Attributes:
        path: where the number or the list is in the configuration.
        members: number of members.
        is_list: whether the configuration has a list with one entry per member, not a number.
        containers: by name, the containers of the layers, each with the number of consecutive
            modules that belong to one member.
    """

    path: Path
    members: int
    is_list: bool
    containers: dict[str, int]

    def description(self) -> str:
        """Return the place of the number or list as it is written in code, such as ``hidden``."""
        return describe_path(self.path)

    def find_member(self, name: str) -> int | None:
        """Return the number of the member that a module or tensor belongs to, or None."""
        for container, size in self.containers.items():
            index, _, _ = name.removeprefix(f"{container}.").partition(".")
            if name.startswith(f"{container}.") and index.isdecimal():
                member = int(index) // size
                return member if member < self.members else None
        return None

    def name_after_removal(self, name: str, removed: int) -> str | None:
        """Return the name of a module or tensor after a member is removed; None if it is in it."""
        for container, size in self.containers.items():
            index, dot, inner_name = name.removeprefix(f"{container}.").partition(".")
            if not name.startswith(f"{container}.") or not index.isdecimal():
                continue
            member = int(index) // size
            if member == removed:
                return None
            new_index = int(index) - (size if member > removed else 0)
            return f"{container}.{new_index}{dot}{inner_name}"
        return name


def find_stacks(model: Model) -> tuple[Stack, ...]:
    """Find the numbers and lists that set the length of containers, with one build for each."""
    before = _count_modules(model.module)
    config = {**find_defaults(model.architecture), **model.network.architecture.config}
    stacks = []
    for path, members, is_list in _iterate_possible_counts(config):
        candidate = Stack(path, members, is_list, containers={})  # they are found below
        try:
            after = _count_modules(
                _build(model, _remove_member_from_config(model, candidate, members - 1))
            )
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            continue
        # The containers that become shorter, with the number of modules that one member has in
        # each. A container must have at least so many modules for every member.
        containers = {
            name: length - after[name]
            for name, length in before.items()
            if after.get(name, length) < length and (length - after[name]) * members <= length
        }
        outermost = {
            name: size
            for name, size in containers.items()
            if not any(name.startswith(f"{other}.") for other in containers)
        }
        if outermost:
            stacks.append(replace(candidate, containers=outermost))
    return tuple(stacks)


def _iterate_possible_counts(config: Any, path: Path = ()) -> Iterator[tuple[Path, int, bool]]:
    """Yield numbers of at least 2 and lists of at least two numbers, which may count layers.

    Yields:
        The path in the configuration, the number or the length of the list, and whether it is a
        list.
    """
    for number_path, value in iterate_integers(config, path):
        if value >= 2:
            yield number_path, value, False
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, list) and len(value) >= 2 and all(type(v) is int for v in value):
            yield (*path, key), len(value), True
        elif isinstance(value, dict | list):
            for inner_path, length, is_list in _iterate_possible_counts(value, (*path, key)):
                if is_list:  # inner numbers were already yielded above
                    yield inner_path, length, is_list


def _count_modules(module: nn.Module) -> dict[str, int]:
    """Return the number of modules in each container, by name."""
    return {
        name: len(part)
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList | nn.Sequential)
    }


def _remove_member_from_config(model: Model, stack: Stack, member: int) -> dict[str, Any]:
    """Return the configuration after one member is removed."""
    config = model.network.architecture.config
    if not stack.is_list:
        return replace_value(model.architecture, config, stack.path, stack.members - 1)
    value: Any = {**find_defaults(model.architecture), **config}
    for key in stack.path:
        value = value[key]
    shorter = [*value[:member], *value[member + 1 :]]
    return replace_value(model.architecture, config, stack.path, shorter)


def _build(model: Model, config: dict[str, Any]) -> nn.Module:
    """Build the network of a configuration, without values of its weights if possible."""
    return construct(model.architecture, config).module


def remove_member(
    model: Model, signature: Signature, stack: Stack, member: int
) -> tuple[Model, Stack]:
    """Build the network without one member; it shares the tensors of the given network.

    Returns:
        The shorter network and the stack that it has.

    Raises:
        NotAMember: the remaining tensors do not fit the shapes of the shorter network, or its
            scores differ from those of the old network with that member skipped.
    """
    config = _remove_member_from_config(model, stack, member)
    try:
        module = rebuild(model, config, lambda name: stack.name_after_removal(name, member))
    except Exception as fault:  # the class or torch may raise any exception
        if is_out_of_memory(fault):
            raise
        message = str(fault).strip().splitlines()[-1].strip()
        raise NotAMember(Reason("rest_does_not_fit", layer=member, fault=message)) from fault
    architecture = model.network.architecture.model_copy(update={"config": config})
    network = model.network.model_copy(update={"architecture": architecture})
    shorter = replace(model, module=module, network=network)
    _require_same_as_skipped(model, shorter, signature, stack, member)
    return shorter, replace(stack, members=stack.members - 1)


def _require_same_as_skipped(
    model: Model, shorter: Model, signature: Signature, stack: Stack, member: int
) -> None:
    """Raise if the shorter network differs from the old one with the member skipped.

    Raises:
        NotAMember: the scores on synthetic rows differ, or the member cannot be skipped.
    """
    tables = table_rows(model.module)
    scores = synthetic_scores(shorter.module, signature, tables)
    gaps = []
    for replacement in (_return_input, _return_zeros):
        skipping = private_copy(model.module).eval()  # new modules that share the tensors
        try:
            with _replace_outputs(skipping, stack, member, replacement):
                gap = describe_score_difference(
                    scores,
                    synthetic_scores(skipping, signature, tables),
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
        raise NotAMember(Reason("not_the_skipping_network", layer=member, gap=gaps[0]))
    raise NotAMember(Reason("cannot_be_skipped", layer=member))


def _return_input(args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return a layer's input, which replaces its output if the layer is skipped."""
    if args[0].shape != output.shape:
        raise ValueError(
            f"Expected an input of shape {tuple(output.shape)}, got {tuple(args[0].shape)}."
        )
    return args[0]


def _return_zeros(args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return zeros, which replace a layer's output if the layer is skipped."""
    return torch.zeros_like(output)


@contextmanager
def _replace_outputs(
    module: nn.Module,
    stack: Stack,
    member: int,
    replacement: Callable[[tuple[Tensor, ...], Tensor], Tensor],
) -> Iterator[None]:
    """Replace the output of every module of a member while the context is active.

    ``replacement`` maps the arguments and the output of a module to the new output.
    """

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return replacement(args, output)

    with ExitStack() as hooks:
        for name, size in stack.containers.items():
            children = list(module.get_submodule(name).children())
            for part in children[member * size : (member + 1) * size]:
                hooks.callback(part.register_forward_hook(hook).remove)
        yield
