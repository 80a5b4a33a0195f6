"""Refit layers that lost input channels, so that their outputs change least.

The remaining inputs of a layer are correlated with the removed ones, so their weights can replace
much of the removed contribution. Least squares over calibration rows gives the weights and bias
whose outputs are nearest to the original outputs. Layers are refitted in the order of their calls,
each on the inputs that it receives from the already refitted layers.

Source: He et al. 2017, https://arxiv.org/abs/1707.06168, eq. 3 (reconstruction with the channels
fixed).
Differs: the bias is refitted too, and a ridge penalty keeps the solution near the original weights,
so that it is stable with few rows or with redundant channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from compressors.contracts import Bench, Signature
from compressors.core.batches import Batch, batches
from compressors.core.scores import call_network
from compressors.core.units import replace_parameter
from compressors.errors.steps import RowsMissing

BATCH = 1024  # calibration rows of one batch
RIDGE = 1e-3
"""Weight of the ridge penalty, as a share of the mean sum of squares of an input."""
TINY = 1e-30  # smallest damping: if all inputs are zero, the weights do not change


def ridge_weights(gram: Tensor, product: Tensor, prior: Tensor, ridge: float = RIDGE) -> Tensor:
    """Solve a ridge regression whose penalty is the distance to prior weights.

    Args:
        gram: ``x.T @ x`` of the inputs, float64 ``(inputs, inputs)``.
        product: ``x.T @ y`` of inputs and target outputs, float64 ``(inputs, outputs)``.
        prior: the original weights, float64 ``(outputs, inputs)``.
        ridge: weight of the distance to the prior, as a share of the mean of the diagonal of
            ``gram``.

    Returns:
        Float64 ``(outputs, inputs)``.
    """
    damping = (ridge * gram.diagonal().mean()).clamp(min=TINY)
    residual = product - gram @ prior.T
    matrix = gram + damping * torch.eye(len(gram), dtype=gram.dtype)
    change: Tensor = torch.linalg.solve(matrix, residual)  # (inputs, outputs)
    return prior + change.T


@torch.no_grad()
def reconstruct(
    module: nn.Module,
    before: nn.Module,
    bench: Bench,
    layers: Sequence[str],
    outputs: Mapping[str, Tensor],
    rows: int,
) -> None:
    """Refit the weights of some layers so that their outputs are nearest to those before pruning.

    Args:
        module: the pruned network in evaluation mode. Its layers get new weights; tensors that it
            shares with other networks are not changed.
        before: the network before pruning.
        bench: with calibration rows.
        layers: names of float32 dense layers; other layers are skipped.
        outputs: by name of a layer that lost outputs, which ones remain: bool
            ``(outputs before,)``.
        rows: largest number of rows to read.

    Raises:
        RowsMissing: there are no calibration rows.
    """
    if bench.calibration is None:
        raise RowsMissing("calibration_rows_missing", step="channels")
    split, signature = bench.calibration, bench.signature

    def read_batches() -> Iterator[Batch]:
        return batches(split, signature, BATCH, rows)

    for name in _call_order(module, next(read_batches()), layers, signature):
        layer = module.get_submodule(name)
        old = before.get_submodule(name)
        if not isinstance(layer, nn.Linear) or not isinstance(old, nn.Linear):
            continue
        size = layer.in_features + (layer.bias is not None)
        gram = torch.zeros(size, size, dtype=torch.float64)
        product = torch.zeros(size, layer.out_features, dtype=torch.float64)
        for batch in read_batches():
            with _record_calls(old, inputs=False) as targets:
                call_network(before, batch.inputs, signature)
            with _record_calls(layer, inputs=True) as layer_inputs:
                call_network(module, batch.inputs, signature)
            # A layer may be called more than once.
            for x, y in zip(layer_inputs, targets, strict=True):
                if layer.bias is not None:
                    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
                gram += x.T @ x
                product += x.T @ (y[:, outputs[name]] if name in outputs else y)
        weight = layer.weight.detach().double()
        if layer.bias is not None:
            weight = torch.cat([weight, layer.bias.detach().double().unsqueeze(1)], dim=1)
        solved = ridge_weights(gram, product, weight).float()
        replace_parameter(layer, "weight", _copy_contiguously(solved[:, : layer.in_features]))
        if layer.bias is not None:
            replace_parameter(layer, "bias", _copy_contiguously(solved[:, -1]))


def _copy_contiguously(part: Tensor) -> Tensor:
    """Copy a tensor contiguously, with the usual strides even if it has only one element."""
    return part.clone(memory_format=torch.contiguous_format)


def _call_order(
    module: nn.Module, rows: Batch, layers: Sequence[str], signature: Signature
) -> list[str]:
    """Return the names of the layers that the network calls, in the order of their first calls."""
    called: dict[str, None] = {}

    def record(name: str) -> Callable[[nn.Module, object], None]:
        def hook(_: nn.Module, args: object) -> None:
            called.setdefault(name)

        return hook

    with ExitStack() as hooks:
        for name in layers:
            layer = module.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(record(name)).remove)
        call_network(module, rows.inputs, signature)
    return list(called)


@contextmanager
def _record_calls(layer: nn.Linear, *, inputs: bool) -> Iterator[list[Tensor]]:
    """Record the inputs or outputs of a layer: float64 ``(rows, features)`` for each call."""
    recorded: list[Tensor] = []

    def hook(
        _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        captured = (args[0] if args else named["input"]) if inputs else output
        recorded.append(captured.reshape(-1, captured.shape[-1]).double())

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield recorded
    finally:
        handle.remove()
