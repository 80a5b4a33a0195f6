"""Layers that read fewer channels, solved anew so that they answer as they did.

What is left of a layer's inputs says much about what went: least squares over rows finds the
weights and bias with which the layer's outputs stay nearest to what they were. Layers are solved
in the order they are called, each on the inputs that those before it now give.

Source: He et al. 2017, https://arxiv.org/abs/1707.06168, eq. 3 (reconstruction with the channels
fixed).
Differs: the bias is solved for too, and the solution is held near the weights as they were, so
that few rows or channels that say the same cannot drive it away.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.core.batches import Batch, batches
from compressors.core.units import own_weight
from compressors.errors.steps import RowsMissing

BATCH = 1024
RIDGE = 1e-3
"""Weight of staying as it was, against the mean square of an input."""
TINY = 1e-30  # where all inputs are zero, the weights stay


def nearest(gram: Tensor, product: Tensor, prior: Tensor, ridge: float = RIDGE) -> Tensor:
    """The weights whose outputs are nearest to what is wanted, and that are near to a prior.

    Args:
        gram: of the inputs with themselves, float64 ``(inputs, inputs)``.
        product: of the inputs with the wanted outputs, float64 ``(inputs, outputs)``.
        prior: weights as they were, float64 ``(outputs, inputs)``.
        ridge: of the mean of the gram matrix's diagonal, the weight of the distance to the prior.
    """
    held = (ridge * gram.diagonal().mean()).clamp(min=TINY)
    wanted = product - gram @ prior.T
    matrix = gram + held * torch.eye(len(gram), dtype=gram.dtype)
    moved: Tensor = torch.linalg.solve(matrix, wanted)  # (inputs, outputs)
    return prior + moved.T


@torch.no_grad()
def reconstruct(
    module: nn.Module,
    before: nn.Module,
    bench: Bench,
    layers: Sequence[str],
    outputs: Mapping[str, Tensor],
    rows: int,
) -> None:
    """Give some layers of a private tree the weights with which they answer as before.

    Args:
        module: in evaluation mode; its layers get weights of their own.
        before: the network as it was.
        bench: with calibration rows.
        layers: names of float32 dense layers; others are passed over.
        outputs: which outputs are left of those that lost some, bool ``(outputs before,)``.
        rows: read, at most.

    Raises:
        CompressionError: there are no calibration rows.
    """
    if bench.calibration is None:
        raise RowsMissing("calibration_rows_missing", step="channels")
    split, signature = bench.calibration, bench.signature

    def read() -> Iterator[Batch]:
        return batches(split, signature, BATCH, rows)

    for name in _in_order(module, read, layers):
        layer = module.get_submodule(name)
        old = before.get_submodule(name)
        if not isinstance(layer, nn.Linear) or not isinstance(old, nn.Linear):
            continue
        size = layer.in_features + (layer.bias is not None)
        gram = torch.zeros(size, size, dtype=torch.float64)
        product = torch.zeros(size, layer.out_features, dtype=torch.float64)
        for batch in read():
            with _recorded(old, inputs=False) as wanted:
                before(**batch.inputs)
            with _recorded(layer, inputs=True) as given:
                module(**batch.inputs)
            for x, y in zip(given, wanted, strict=True):  # a layer may be called more than once
                if layer.bias is not None:
                    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
                gram += x.T @ x
                product += x.T @ (y[:, outputs[name]] if name in outputs else y)
        weight = layer.weight.detach().double()
        if layer.bias is not None:
            weight = torch.cat([weight, layer.bias.detach().double().unsqueeze(1)], dim=1)
        solved = nearest(gram, product, weight).float()
        own_weight(layer, "weight", _alone(solved[:, : layer.in_features]))
        if layer.bias is not None:
            own_weight(layer, "bias", _alone(solved[:, -1]))


def _alone(part: Tensor) -> Tensor:
    """A tensor of its own, in order; ``contiguous`` keeps the strides of a single number."""
    return part.clone(memory_format=torch.contiguous_format)


def _in_order(
    module: nn.Module, read: Callable[[], Iterator[Batch]], layers: Sequence[str]
) -> list[str]:
    """The layers as they are called, first call first."""
    called: dict[str, None] = {}

    def noted(name: str) -> Callable[[nn.Module, object], None]:
        def hook(_: nn.Module, args: object) -> None:  # noqa: ARG001
            called.setdefault(name)

        return hook

    with ExitStack() as hooks:
        for name in layers:
            layer = module.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(noted(name)).remove)
        module(**next(read()).inputs)
    return list(called)


@contextmanager
def _recorded(layer: nn.Linear, *, inputs: bool) -> Iterator[list[Tensor]]:
    """Inside, what a layer is given or answers, float64 ``(rows, features)`` a call."""
    recorded: list[Tensor] = []

    def hook(
        _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        found = (args[0] if args else named["input"]) if inputs else output
        recorded.append(found.reshape(-1, found.shape[-1]).double())

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield recorded
    finally:
        handle.remove()
