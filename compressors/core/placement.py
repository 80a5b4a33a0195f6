"""Move a network and its batches to another device for the time of a computation.

``nn.Module.to`` writes into parameters that a private tree shares with the caller's model, so
tensors are replaced one by one here, and restored afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressors.core.batches import Batch
from compressors.errors.steps import StepRefused


@dataclass(frozen=True)
class _Moved:
    """A tensor, its module and name, and the copy on the other device that replaces it."""

    owner: nn.Module
    name: str
    old: Tensor
    new: Tensor


@contextmanager
def moved_to(module: nn.Module, device: str) -> Iterator[None]:
    """Move a private copy of a module to a device inside the context, and back afterwards.

    Tensors that were not replaced inside the context are restored as the original objects with
    unchanged bits; replaced ones are copied back. Shared tensors remain shared. Tensors that are
    plain attributes of a module are not moved.

    Raises:
        CompressionError: this machine has no such device.
    """
    target = torch.device(device)
    if target.type == "cpu":
        yield
        return
    require_device(target)
    moved = _move(module, target)
    try:
        yield
    finally:
        _restore(moved)


def require_device(device: torch.device) -> None:
    """Raise if a device is not available.

    Raises:
        CompressionError: torch has no such device on this machine.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StepRefused("device_missing", device=str(device), torch=torch.__version__)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device; for the CPU, return it unchanged."""
    if device.type == "cpu":
        return batch
    group = None if batch.group is None else batch.group.to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    return Batch(inputs, batch.label.to(device), group)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first tensor; the CPU for a module without tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _move(module: nn.Module, device: torch.device) -> list[_Moved]:
    copies: dict[int, Tensor] = {}
    moved = []
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, old in list(tensors.items()):
                if old is None:
                    continue
                if id(old) not in copies:
                    new: Tensor = old.detach().to(device)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    copies[id(old)] = new
                tensors[name] = copies[id(old)]  # type: ignore[assignment]
                moved.append(_Moved(owner, name, old, copies[id(old)]))
    return moved


def _restore(moved: list[_Moved]) -> None:
    copies: dict[int, Tensor] = {}
    for item in moved:
        parameters = item.owner._parameters if item.name in item.owner._parameters else None
        place = item.owner._buffers if parameters is None else parameters
        now = place[item.name]
        if now is None or now.data_ptr() == item.new.data_ptr():
            place[item.name] = item.old  # type: ignore[assignment]
            continue
        if id(now) not in copies:
            back: Tensor = now.detach().to(item.old.device)
            if isinstance(now, nn.Parameter):
                back = nn.Parameter(back, requires_grad=now.requires_grad)
            copies[id(now)] = back
        place[item.name] = copies[id(now)]  # type: ignore[assignment]
