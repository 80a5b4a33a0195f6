"""Building a network without its weights: only shapes, whatever its tables weigh."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_LOCK = threading.Lock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, parameters registered by this thread land on the meta device; buffers stay real.

    ``torch.device("meta")`` would catch buffers and plain tensor attributes too, and nothing
    could bring back those that no file stores (offsets, position ids).
    """
    here = threading.get_ident()
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == here and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with _LOCK:
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
