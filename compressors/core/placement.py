"""Move a network and its batches to another device temporarily.

``nn.Module.to`` writes into parameters. A private copy of a network shares them with the caller's
model, so this file replaces the copy's tensors one by one, and restores them afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressors.core.batches import Batch, SampledItems
from compressors.errors.steps import StepRefused


@dataclass(frozen=True)
class _MovedTensor:
    """A tensor that was replaced by a copy on the other device.

    Attributes:
        owner: the module that registers the tensor.
        name: the tensor's name in that module.
        original: the tensor before the move.
        copy: the tensor on the other device.
    """

    owner: nn.Module
    name: str
    original: Tensor
    copy: Tensor


@contextmanager
def move_to(module: nn.Module, device: str) -> Iterator[None]:
    """Move a private copy of a module to a device inside the context, and back afterwards.

    If the code inside the context assigns a new tensor to a name, that tensor is copied back.
    Otherwise the name has the original tensor again; values written into the copy on the device are
    discarded. Shared tensors remain shared. Tensors in attributes that are neither parameters nor
    buffers are not moved.

    Raises:
        StepRefused: the device is not available on this machine.
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
    """Raise if a CUDA device is required and not available.

    Raises:
        StepRefused: ``device`` is a CUDA device, and torch finds none on this machine.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StepRefused("device_missing", device=str(device), torch=torch.__version__)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device; for the CPU, return it unchanged."""
    if device.type == "cpu":
        return batch
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    group, item, share = (
        None if values is None else values.to(device)
        for values in (batch.group, batch.item, batch.item_log_share)
    )
    label = batch.label.to(device)
    sampled = None if batch.sampled is None else _items_to_device(batch.sampled, device)
    return Batch(inputs, label, group, batch.output_weights, item, share, sampled)


def _items_to_device(sampled: SampledItems, device: torch.device) -> SampledItems:
    return SampledItems(
        {name: tensor.to(device) for name, tensor in sampled.inputs.items()},
        sampled.item.to(device),
        sampled.item_log_share.to(device),
        sampled.drawn_share,
    )


def find_device(module: nn.Module) -> torch.device:
    """Return the device of a module's first tensor; the CPU for a module without tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _move(module: nn.Module, device: torch.device) -> list[_MovedTensor]:
    """Replace all parameters and buffers by copies on a device; return what was replaced."""
    copies: dict[int, Tensor] = {}  # by id of the original, so that shared tensors remain shared
    moved = []
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, original in list(tensors.items()):
                if original is None:
                    continue
                if id(original) not in copies:
                    copy: Tensor = original.detach().to(device)
                    if isinstance(original, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=original.requires_grad)
                    copies[id(original)] = copy
                tensors[name] = copies[id(original)]  # type: ignore[assignment]
                moved.append(_MovedTensor(owner, name, original, copies[id(original)]))
    return moved


def _restore(moved: list[_MovedTensor]) -> None:
    """Put back the original tensors, and copy back tensors that were replaced meanwhile."""
    copies: dict[int, Tensor] = {}  # by id of the replacement
    for item in moved:
        parameters = item.owner._parameters if item.name in item.owner._parameters else None
        tensors = item.owner._buffers if parameters is None else parameters
        current = tensors[item.name]
        if current is None or current.data_ptr() == item.copy.data_ptr():
            tensors[item.name] = item.original  # type: ignore[assignment]
            continue
        if id(current) not in copies:
            copy: Tensor = current.detach().to(item.original.device)
            if isinstance(current, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=current.requires_grad)
            copies[id(current)] = copy
        tensors[item.name] = copies[id(current)]  # type: ignore[assignment]
