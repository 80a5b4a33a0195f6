"""Select how many groups each width keeps: an equal share, or the groups above one threshold.

A *width* is a number of the configuration that counts the channels of one or more layers, or groups
of channels such as heads (``prune/structure/config_widths.py``). A *group* is one such channel or
head, a *producer* is a dense layer that outputs the channels, and a *consumer* takes them as
inputs. Widths depend on each other: a layer between two pruned widths has fewer outputs and fewer
inputs, so its multiply-adds decrease with the product. So the widths for a given number of
multiply-adds are found by a search over the rounded widths.

Sources: Liu et al. 2017, https://arxiv.org/abs/1708.06519 (one threshold over all layers).
Differs: importance is first divided by its mean over the width, because a layer's norm depends more
on the number of its weights than on its importance; and no width falls below a floor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import ceil, gcd, inf

import torch
from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.core.modules.formats import PackedLinear
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import call_network
from compressors.core.units import table_rows
from compressors.errors.steps import StepRefused
from compressors.prune.structure.channel_consumers import WidthConsumers
from compressors.prune.structure.config_widths import Path, Width

Counts = dict[Path, int]
"""By the path of a width in the configuration, the number of groups that it keeps."""
SEARCH_STEPS = 1000  # resolution of the search for the share that every width keeps
ROWS = 4  # synthetic rows, to count how often each layer is called


def kept_width(value: int, keep: float, multiple: int) -> int:
    """Return ``keep`` times ``value``, rounded to a multiple and at least ``multiple``."""
    return max(multiple, round(value * keep / multiple) * multiple)


def multiple_of(width: Width, multiple: int) -> int:
    """Return the smallest number of groups whose channels are a multiple of ``multiple``.

    With 4 channels per group and the multiple 8, for example, it is 2. If producers have different
    numbers of channels per group, their greatest common divisor counts.
    """
    size = gcd(*width.producers.values())
    return multiple // gcd(multiple, size)


def multiply_adds(module: nn.Module, signature: Signature) -> dict[str, float]:
    """Return the multiply-adds of each dense layer for one row: weights times calls, by name.

    A layer over a sequence is called once per position; padding counts, because it is computed too.
    """
    layers = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | PackedLinear)
    }
    inputs = generate_inputs(signature, table_rows(module), ROWS)
    with torch.no_grad(), _count_calls(layers) as calls:
        call_network(module, inputs, signature)
    return {
        name: calls[name] / ROWS * layer.in_features * layer.out_features
        for name, layer in layers.items()
    }


@contextmanager
def _count_calls(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Count the vectors that each layer maps while the context is active, by layer name."""
    calls = dict.fromkeys(layers, 0)

    def count_hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, args: object, output: Tensor) -> None:
            calls[name] += output.numel() // output.shape[-1]

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(count_hook(name)).remove)
        yield calls


def remaining_multiply_adds(
    work: Mapping[str, float],
    module: nn.Module,
    widths: Sequence[Width],
    counts: Mapping[Path, int],
) -> float:
    """Return the multiply-adds of all layers after the widths are reduced, for one row.

    Args:
        work: present multiply-adds for one row, by layer.
        module: the network with these layers.
        widths: the pruned widths, each a different number of the configuration.
        counts: number of groups that each width keeps.

    Raises:
        TypeError: a name in ``work`` is not the name of a dense layer.
    """
    total = 0.0
    for name, before in work.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear | PackedLinear):
            raise TypeError(f"Expected a dense layer, got {name!r}.")
        outputs, inputs = layer.out_features, layer.in_features
        removed_outputs = sum(w.producers.get(name, 0) * (w.value - counts[w.path]) for w in widths)
        removed_inputs = sum(w.consumers.get(name, 0) * (w.value - counts[w.path]) for w in widths)
        total += before * (1 - removed_outputs / outputs) * (1 - removed_inputs / inputs)
    return total


def equal_shares(
    widths: Sequence[Width], initial: Mapping[Path, int], keep: float, multiple: int
) -> Counts:
    """Return the number of groups that each width keeps if all widths keep the same share.

    It is rounded to the nearest multiple, and at most the present number of groups.

    Args:
        widths: the present widths.
        initial: by width, the number of groups before the first round, of which the share is taken.
        keep: the share of groups that is kept.
        multiple: the number of channels stays a multiple of this.
    """
    return {
        width.path: min(
            width.value, kept_width(initial[width.path], keep, multiple_of(width, multiple))
        )
        for width in widths
    }


def kept_above_threshold(
    importance: Mapping[Path, Tensor],
    widths: Sequence[Width],
    floors: Mapping[Path, float],
    threshold: float,
    multiple: int,
) -> Counts:
    """Return the number of groups above a threshold, rounded to a multiple, at least the floor.

    Args:
        importance: by width, the importance of its groups, float ``(groups,)``.
        widths: the present widths.
        floors: by width, the smallest number of groups that it keeps; rounded up to a multiple.
        threshold: groups of a higher importance are kept.
        multiple: the number of channels stays a multiple of this.
    """
    counts = {}
    for width in widths:
        groups_per_multiple = multiple_of(width, multiple)
        floor = max(
            groups_per_multiple,
            ceil(floors[width.path] / groups_per_multiple) * groups_per_multiple,
        )
        above = (
            round(int((importance[width.path] > threshold).sum()) / groups_per_multiple)
            * groups_per_multiple
        )
        counts[width.path] = min(width.value, max(floor, above))
    return counts


def normalized_importance(
    consumers: Sequence[WidthConsumers], importance: Mapping[str, Tensor]
) -> dict[Path, Tensor]:
    """Sort and normalize the importance of the groups, so that widths can be compared.

    Tied producers, whose channels are combined element by element, keep the same groups: their sum
    of importances is sorted and divided by its mean. If a width has producers that are not tied to
    each other, it gets the mean of their sorted importances, rank by rank.

    Args:
        consumers: the consumers of each width.
        importance: by producer, float ``(groups,)``.

    Returns:
        By width, float ``(groups,)`` in descending order.
    """
    normalized = {}
    for item in consumers:
        ranked = []
        for tied in item.tied_producers:
            total = torch.stack([importance[producer] for producer in tied]).sum(dim=0)
            mean = total.mean()
            relative = total / mean if bool(mean > 0) else torch.ones_like(total)
            ranked.append(relative.sort(descending=True).values)
        normalized[item.width.path] = torch.stack(ranked).mean(dim=0)  # (groups,)
    return normalized


def counts_by_threshold(
    importance: Mapping[Path, Tensor],
    widths: Sequence[Width],
    floors: Mapping[Path, float],
    multiple: int,
    cost: Callable[[Counts], float],
    max_cost: float,
    cost_unit: str,
) -> Counts:
    """Return the number of groups above the lowest threshold with a cost of at most ``max_cost``.

    For the arguments see ``kept_above_threshold`` and ``largest_counts_within``.

    Raises:
        StepRefused: even with every width at its floor the cost is above ``max_cost``.
    """
    values = {value for groups in importance.values() for value in groups.tolist()}
    # The first threshold leaves every width at its floor, the last one keeps all groups.
    thresholds = [inf, *sorted(values, reverse=True), -1.0]
    return largest_counts_within(
        lambda k: kept_above_threshold(importance, widths, floors, thresholds[k], multiple),
        len(thresholds),
        cost,
        max_cost,
        cost_unit,
    )


def largest_counts_within(
    candidate: Callable[[int], Counts],
    number: int,
    cost: Callable[[Counts], float],
    max_cost: float,
    cost_unit: str,
) -> Counts:
    """Find the last of a series of counts with a cost of at most ``max_cost``, by binary search.

    Args:
        candidate: maps an index, 0 to ``number - 1``, to counts; their cost does not decrease with
            the index.
        number: how many candidates there are.
        cost: returns the cost of some counts, such as multiply-adds.
        max_cost: the largest allowed cost.
        cost_unit: unit of the cost, for the error message.

    Raises:
        StepRefused: even the first candidate costs more than ``max_cost``.
    """
    low, high = 0, number - 1
    least_cost = cost(candidate(0))
    if least_cost > max_cost:
        raise StepRefused("share_unreachable", limit=max_cost, units=cost_unit, least=least_cost)
    while low < high:
        middle = (low + high + 1) // 2
        if cost(candidate(middle)) <= max_cost:
            low = middle
        else:
            high = middle - 1
    return candidate(low)
