"""What dense layers read on rows of data: a network is run, and each layer's input is looked at."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.batches import batches

BATCH = 1024

See = Callable[[Tensor], None]
"""Is given what a layer reads in one call, as float ``(vectors, inputs)``."""


def watch_inputs(
    module: nn.Module, signature: Signature, split: Split, rows: int, see: Mapping[str, See]
) -> None:
    """Run a network on the first ``rows`` rows of a split and show the inputs of some layers.

    Args:
        module: in evaluation mode; left as it is.
        signature: of its inputs.
        split: the rows.
        rows: how many of them, at most.
        see: by layer, what is told; a sequence's places are vectors like any other.
    """

    def hook(tell: See) -> Any:
        def look(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            tell(x.detach().reshape(-1, x.shape[-1]))

        return look

    with ExitStack() as hooks, torch.no_grad():
        for name, tell in see.items():
            layer = module.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(hook(tell), with_kwargs=True).remove)
        for batch in batches(split, signature, BATCH, rows):
            module(**batch.inputs)
