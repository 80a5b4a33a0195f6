"""How many units each width keeps: the same share of all, or what one threshold leaves of them.

Widths hang together: a layer between two of them has fewer outputs and fewer inputs, so its
multiply-adds fall with the product. A target of multiply-adds is therefore searched for, over the
widths as they are after rounding.

Sources: Liu et al. 2017, https://arxiv.org/abs/1708.06519 (one threshold over all layers).
Differs: importance is divided by its mean over the width first, since a layer's norm says more of
how many numbers it sums than of what it is worth; and no width falls below a floor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import ceil, gcd, inf

import torch
from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.core.batches import example
from compressors.core.modules.formats import PackedLinear
from compressors.core.units import table_rows
from compressors.errors.steps import StepRefused
from compressors.prune.structure.channel_consumers import Readers
from compressors.prune.structure.config_widths import Path, Width

Counts = dict[Path, int]
"""By the number of a configuration, how many of its units stay."""
STEPS = 1000  # in which the share that every width keeps is searched for
ROWS = 4  # made-up ones that say how often a layer is called


def kept_width(value: int, keep: float, multiple: int) -> int:
    """The new width: ``keep`` of the old one to the nearest multiple, at least one of them."""
    return max(multiple, round(value * keep / multiple) * multiple)


def multiple_of(width: Width, multiple: int) -> int:
    """In units of a width: the channels of every maker stay a multiple of ``multiple``."""
    size = gcd(*width.makers.values())
    return multiple // gcd(multiple, size)


def multiply_adds(module: nn.Module, signature: Signature) -> dict[str, float]:
    """Multiply-adds of each dense layer for one row: its weights, as often as it is called.

    A layer over a sequence is called once a position; padding counts, as it is computed too.
    """
    layers = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | PackedLinear)
    }
    inputs = example(signature, table_rows(module), ROWS)
    with torch.no_grad(), _counting(layers) as calls:
        module(**inputs)
    return {
        name: calls[name] / ROWS * layer.in_features * layer.out_features
        for name, layer in layers.items()
    }


@contextmanager
def _counting(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    calls = dict.fromkeys(layers, 0)

    def counted(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, args: object, output: Tensor) -> None:  # noqa: ARG001
            calls[name] += output.numel() // output.shape[-1]

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(counted(name)).remove)
        yield calls


def remaining_multiply_adds(
    work: Mapping[str, float],
    module: nn.Module,
    widths: Sequence[Width],
    counts: Mapping[Path, int],
) -> float:
    """Multiply-adds of all layers if the widths keep so many units.

    Args:
        work: by layer, as they are now.
        module: whose layers they are.
        widths: each a number of its own.
        counts: units that stay.
    """
    total = 0.0
    for name, before in work.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear | PackedLinear):
            raise TypeError(f"{name!r} is no dense layer")
        outputs, inputs = layer.out_features, layer.in_features
        gone_out = sum(w.makers.get(name, 0) * (w.value - counts[w.path]) for w in widths)
        gone_in = sum(w.readers.get(name, 0) * (w.value - counts[w.path]) for w in widths)
        total += before * (1 - gone_out / outputs) * (1 - gone_in / inputs)
    return total


def equal_shares(
    widths: Sequence[Width], first: Mapping[Path, int], keep: float, multiple: int
) -> Counts:
    """The same share of every width, to its nearest multiple, and no more than there are.

    Args:
        widths: as they are now.
        first: how many units they had when the share was asked for.
        keep: the share.
        multiple: of channels.
    """
    return {
        width.path: min(
            width.value, kept_width(first[width.path], keep, multiple_of(width, multiple))
        )
        for width in widths
    }


def kept_above_threshold(
    curves: Mapping[Path, Tensor],
    widths: Sequence[Width],
    floors: Mapping[Path, float],
    threshold: float,
    multiple: int,
) -> Counts:
    """What a threshold leaves of every width, to its nearest multiple and never below its floor.

    Args:
        curves: by width, the importance of its units, float ``(units,)``.
        widths: as they are now.
        floors: units that a width keeps whatever they are worth; rounded up.
        threshold: units above it stay.
        multiple: of channels.
    """
    counts = {}
    for width in widths:
        step = multiple_of(width, multiple)
        floor = max(step, ceil(floors[width.path] / step) * step)
        found = round(int((curves[width.path] > threshold).sum()) / step) * step
        counts[width.path] = min(width.value, max(floor, found))
    return counts


def curves_of(readers: Sequence[Readers], importance: Mapping[str, Tensor]) -> dict[Path, Tensor]:
    """The importance of every unit by rank, comparable between widths.

    Of each group of makers that keep the same units the importance is sorted and divided by its
    mean; a width that several groups follow has the mean of theirs, rank by rank.
    """
    curves = {}
    for item in readers:
        ranked = []
        for group in item.tied:
            total = torch.stack([importance[maker] for maker in group]).sum(dim=0)
            mean = total.mean()
            even = total / mean if bool(mean > 0) else torch.ones_like(total)
            ranked.append(even.sort(descending=True).values)
        curves[item.width.path] = torch.stack(ranked).mean(dim=0)  # (units,)
    return curves


def by_threshold(
    curves: Mapping[Path, Tensor],
    widths: Sequence[Width],
    floors: Mapping[Path, float],
    multiple: int,
    cost: Callable[[Counts], float],
    limit: float,
    what: str,
) -> Counts:
    """What the lowest threshold leaves whose cost, in ``what``, is within a limit.

    The others are those of ``kept_above_threshold`` and ``largest_within``.
    """
    every = sorted({value for curve in curves.values() for value in curve.tolist()}, reverse=True)
    thresholds = [inf, *every, -1.0]
    return largest_within(
        lambda k: kept_above_threshold(curves, widths, floors, thresholds[k], multiple),
        len(thresholds),
        cost,
        limit,
        what,
    )


def largest_within(
    candidate: Callable[[int], Counts],
    number: int,
    cost: Callable[[Counts], float],
    limit: float,
    what: str,
) -> Counts:
    """The last of some counts, each at least the one before, whose cost is within a limit.

    Raises:
        CompressionError: even the first is not.
    """
    low, high = 0, number - 1
    if cost(candidate(0)) > limit:
        raise StepRefused("share_unreachable", limit=limit, units=what, least=cost(candidate(0)))
    while low < high:
        middle = (low + high + 1) // 2
        if cost(candidate(middle)) <= limit:
            low = middle
        else:
            high = middle - 1
    return candidate(low)
