"""Contexts in which a network's class is built, with or without values of its parameters.

``construction.py`` builds a class in one of two contexts: ``parameters_on_meta``, or
``create_on_cpu`` if the constructor needs the values. In both, no tensor is on an accelerator, even
if the constructor moves it there: recpress decides where a network runs.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _device

from compressors.errors.construction import TooLarge

_LOCK = threading.Lock()  # held while ``nn.Module.register_parameter`` is replaced
# The functions that ``Placement`` receives for ``tensor.device`` and ``tensor.data = values``.
_DEVICE_GETTER = Tensor.device.__get__
_DATA_SETTER = Tensor.data.__set__  # type: ignore[attr-defined]
_MOVES = {Tensor.cuda, Tensor.cpu, Tensor.xpu, Tensor.pin_memory}  # to another device or memory
ACCELERATOR = re.compile(r"(cuda|xpu|hpu|mps|npu|xla)(:\d+)?")
"""Matches torch's names of devices that are accelerators."""


@dataclass
class ConstructionLimits:
    """Limits on the tensors that a constructor may create.

    Attributes:
        tensor_bytes: largest size of one tensor.
        tensors: number of tensors that may still be created.
    """

    tensor_bytes: int
    tensors: int

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a tensor that ``func(*args, **kwargs)`` will create, and check its size.

        Raises:
            TooLarge: the tensor exceeds ``tensor_bytes``, or the number of tensors is used up.
        """
        self.tensors -= 1
        if self.tensors < 0:
            raise TooLarge("tensors_many")
        try:
            with torch._C.DisableTorchFunction():
                size = func(*args, **{**kwargs, "device": "meta"}).nbytes
        except (RuntimeError, NotImplementedError, TypeError):
            return  # the real call raises the error
        if size > self.tensor_bytes:
            raise TooLarge("tensor_large", bytes=size, most_bytes=self.tensor_bytes)


class Placement(TorchFunctionMode):
    """Keeps new tensors on the CPU, and meta tensors on meta, while a class is built.

    Args:
        limits: limits on the tensors that may be created; None for no limits.

    Attributes:
        devices: other devices that the constructor requested, in order.
        originals: each parameter that was moved to meta, with a weak reference to its previous
            memory.
    """

    def __init__(self, limits: ConstructionLimits | None = None) -> None:
        super().__init__()
        self._limits = limits
        self.devices: list[str] = []
        self.originals: list[tuple[StorageWeakRef, nn.Parameter]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with each device argument replaced by the CPU or meta."""
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None:
            if func == _DEVICE_GETTER:
                return torch.device("cpu") if tensor.is_meta else func(*args, **kwargs)
            if func in _MOVES:
                if func not in (Tensor.cpu, Tensor.pin_memory):
                    self._record_device(f"{func.__name__}")
                return tensor
            if func == _DATA_SETTER and tensor.is_meta and not args[1].is_meta:
                return func(tensor, args[1].to("meta"))
            if func is Tensor.type and (kind := (*args[1:], *kwargs.values())[:1]):
                return tensor.to(_find_dtype_of_legacy_type(kind[0]))
            if func is Tensor.to:
                args, kwargs = self._keep_device(tensor, args[1:], kwargs)
        # torch adds the default device later than this mode runs, so it is added here.
        is_new = func in _device._device_constructors()
        if is_new and self._limits is not None:
            self._limits.check(func, args, kwargs)
        if kwargs.get("device") is None and is_new:
            kwargs["device"] = _device.CURRENT_DEVICE
        if kwargs.get("device") is not None:
            kwargs["device"] = self._replace_device(kwargs["device"], tensor)
        return func(*args, **kwargs)

    def _keep_device(
        self, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace arguments of ``Tensor.to`` so that it changes the dtype but not the device."""
        other = kwargs.pop("other", None)
        if other is None and args and isinstance(args[0], Tensor):
            other, args = args[0], args[1:]
        if other is not None:
            return (tensor, other.dtype, *args), kwargs
        if args and not isinstance(args[0], torch.dtype | bool):
            args = (self._replace_device(args[0], tensor), *args[1:])
        return (tensor, *args), kwargs

    def _replace_device(self, device: Any, tensor: Tensor | None) -> torch.device:
        """Record a requested device; return the one to use: meta for meta tensors, else the CPU."""
        if device is not None:
            try:
                requested = torch.device("cuda", device) if type(device) is int else device
                requested = torch.device(requested)
            except RuntimeError:  # not a device: the real call raises the error
                return device  # type: ignore[no-any-return]
            if requested.type not in ("cpu", "meta"):
                self._record_device(str(requested))
        return torch.device("meta" if tensor is not None and tensor.is_meta else "cpu")

    def _record_device(self, device: str) -> None:
        """Add a requested device to ``devices`` once."""
        if device not in self.devices:
            self.devices.append(device)

    def drop_values(self, parameter: nn.Parameter) -> nn.Parameter:
        """Move a parameter to meta, which drops its values; references to it remain valid."""
        storage = parameter.untyped_storage()
        # This mode would otherwise intercept these calls and keep the copy on the CPU.
        with torch._C.DisableTorchFunction():
            values = parameter.detach().to("meta")
            empty = nn.Parameter(values, requires_grad=parameter.requires_grad)
            if not exchange(parameter, empty):
                return empty
        previous_memory = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.originals.append((previous_memory, parameter))
        return parameter


@contextmanager
def create_on_cpu(limits: ConstructionLimits | None = None) -> Iterator[Placement]:
    """Create tensors of this thread on the CPU and keep them there, inside the context."""
    with _defaults_restored(), Placement(limits) as placement:
        yield placement


@contextmanager
def parameters_on_meta(limits: ConstructionLimits | None = None) -> Iterator[Placement]:
    """Register this thread's parameters on meta inside the context; buffers have values.

    ``torch.device("meta")`` would also create buffers and plain tensor attributes on meta. No file
    stores some of these (offsets, position ids), so they would have no values after loading.
    """
    thread = threading.get_ident()
    register = nn.Module.register_parameter
    placement = Placement(limits)

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == thread:
            param = param if param.is_meta or is_lazy(param) else placement.drop_values(param)
        register(module, name, param)

    with _LOCK:
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            with _defaults_restored(), placement:
                yield placement
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _defaults_restored() -> Iterator[None]:
    """Restore the default device and dtype afterwards; a constructor may change them."""
    dtype, device = torch.get_default_dtype(), _device.CURRENT_DEVICE
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if device != _device.CURRENT_DEVICE:
            torch.set_default_device(device)


def exchange(first: Tensor, second: Tensor) -> bool:
    """Exchange the values of two tensor objects in place; references to the objects remain valid.

    The tensors keep their classes and Python attributes. Returns False, and changes nothing, if
    torch cannot exchange them: a tensor has weak references or is part of an autograd graph.
    """
    kinds = type(first), type(second)
    attributes = dict(vars(first)), dict(vars(second))
    try:
        torch.utils.swap_tensors(first, second)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError):
        return False
    for tensor, kind, values in zip((first, second), kinds, attributes, strict=True):
        if type(tensor) is not kind:
            tensor.__class__ = kind
        vars(tensor).clear()
        vars(tensor).update(values)
    return True


def _find_dtype_of_legacy_type(kind: Any) -> torch.dtype:
    """Return the dtype of a legacy tensor type, such as ``torch.cuda.FloatTensor`` or its name."""
    if isinstance(kind, torch.dtype):
        return kind
    name = kind if isinstance(kind, str) else kind.__name__
    dtype: torch.dtype = getattr(torch, name.rpartition(".")[2]).dtype
    return dtype
