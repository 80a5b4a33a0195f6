"""Importance of weights, and of channels as the sum of their weights' importances.

Sources: Li et al. 2017, https://arxiv.org/abs/1608.08710 (L1 norm of a filter); Molchanov et al.
2019, https://arxiv.org/abs/1906.10771, eq. 8 (first-order Taylor importance); Sun et al. 2024,
https://arxiv.org/abs/2306.11695, eq. 1 (a weight times the norm of its input).
Differs: the importance of a channel includes the weights that produce it and the weights that
consume it, as for dependency groups (Fang et al. 2023, https://arxiv.org/abs/2301.12900). With
``activation`` only the consumers count: importance is the mean square of the channel's contribution
to their outputs, as a share of the contributions of all their inputs, because the outputs of
different consumers differ in scale.

Here a *group* is one channel or several that are counted as one (a head), a *producer* a layer that
outputs it, and a *consumer* a layer or norm that takes it as input
(``prune/structure/config_widths.py``).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.core.batches import batches
from compressors.core.model import Model
from compressors.core.scores import call_network, network_scores
from compressors.core.units import Unit, private_copy, replace_parameter
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.prune.structure.channel_consumers import WidthConsumers
from compressors.task_kinds.loss import hard_loss, shuffled_batches

Importance = Literal["l1", "l2", "gradient", "activation", "random"]
BATCH = 1024  # rows of one batch
TINY = 1e-300  # smallest divisor: for a layer whose inputs are all zero the result is 0


def weight_importance(
    model: Model, bench: Bench, importance: Importance, rows: int
) -> dict[str, Tensor]:
    """Compute the importance of every weight that is not in a table, by parameter name.

    The sum over the weights of a channel is the importance of the channel.

    Args:
        model: the network; its tensors are not changed.
        bench: provides training rows for ``gradient``, calibration rows for ``activation``.
        importance: the criterion, a setting of the step ``channels``.
        rows: largest number of rows to read.

    Returns:
        By parameter name, float in the shape of the parameter. With ``activation``, only for the
        weights of float32 dense layers.

    Raises:
        RowsMissing: the bench has no rows of the kind that the criterion needs.
        StepRefused: the importance of every weight is zero.
    """
    tables = tuple(unit.name for unit in Unit.of(model.module) if unit.role == "table")
    weights = {
        name: weight.detach()
        for name, weight in model.module.named_parameters(remove_duplicate=False)
        if not name.startswith(tuple(f"{table}." for table in tables))
    }
    match importance:
        case "l1":
            scores = {name: weight.abs() for name, weight in weights.items()}
        case "l2":
            scores = {name: weight.square() for name, weight in weights.items()}
        case "random":
            generator = torch.Generator().manual_seed(bench.seed)
            scores = {name: torch.rand(w.shape, generator=generator) for name, w in weights.items()}
        case "gradient":
            scores = _compute_taylor_importance(model.module, bench, weights, rows)
        case "activation":
            scores = _compute_contributions(model.module, bench, rows)
    if not any(bool(score.any()) for score in scores.values()):
        raise (
            StepRefused("channel_gradients_zero")
            if importance == "gradient"
            else StepRefused("channel_inputs_zero", importance=importance)
        )
    return scores


def group_importance(
    consumers: WidthConsumers, scores: Mapping[str, Tensor], importance: Importance
) -> dict[str, Tensor]:
    """Sum the importances of the weights that produce and that consume each group of a width.

    Args:
        consumers: the consumers of the width, with the group of each channel of a producer
            (``groups``), and for each producer and consumer which inputs take which group
            (``connections``, bool ``(groups, inputs)``).
        scores: by parameter name, the importance of every weight, in the parameter's shape.
        importance: the criterion; with ``activation`` only the consuming weights count.

    Returns:
        By producer, float ``(groups,)``.
    """
    totals = {}
    for producer, groups in consumers.groups.items():
        total = torch.zeros(consumers.width.value)
        if importance != "activation":
            channels = scores[f"{producer}.weight"].sum(dim=1)  # (channels,)
            if f"{producer}.bias" in scores:
                channels = channels + scores[f"{producer}.bias"]
            total = total.index_add(0, groups, channels)
        for (name, consumer), columns in consumers.connections.items():
            if name == producer:
                inputs = scores.get(f"{consumer}.weight")  # (out, in), or (in,) of a norm
                if inputs is None:  # a norm without weights
                    continue
                inputs = inputs.sum(dim=0) if inputs.dim() == 2 else inputs  # (in,)
                total = total + columns.to(inputs.dtype) @ inputs
        totals[producer] = total
    return totals


def select_kept_groups(
    consumers: WidthConsumers, importance: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Select the most important groups: by producer, bool ``(groups,)`` with ``count`` True.

    Producers whose channels are combined element by element keep the same groups, ranked by the sum
    of their importances. Of equally important groups the first ones are kept.

    Args:
        consumers: the consumers of the width.
        importance: by producer, float ``(groups,)``.
        count: number of groups to keep.
    """
    kept_by_producer = {}
    for tied in consumers.tied_producers:
        total = torch.stack([importance[producer] for producer in tied]).sum(dim=0)
        best = total.sort(descending=True, stable=True).indices[:count]
        mask = torch.zeros(len(total), dtype=torch.bool)
        mask[best] = True
        kept_by_producer.update(dict.fromkeys(tied, mask))
    return kept_by_producer


def _compute_taylor_importance(
    module: nn.Module, bench: Bench, weights: Mapping[str, Tensor], rows: int
) -> dict[str, Tensor]:
    """Compute (gradient of the loss times weight) squared, summed over batches of training rows.

    Raises:
        RowsMissing: there are no training rows.
    """
    if bench.train is None:
        raise RowsMissing("gradients_need_rows")
    copied = private_copy(module).eval()
    leaves: dict[str, nn.Parameter] = {}
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        leaves[name] = replace_parameter(copied.get_submodule(owner), attribute, weight)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in shuffled_batches(bench.train, bench.signature, BATCH, bench.seed, limit=rows):
        scores = network_scores(copied, batch.inputs, bench.signature)
        loss = hard_loss(bench.signature, scores, batch)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            if grad is not None:
                total[name] += (grad * leaf.detach()).square()
    return total


@torch.no_grad()
def _compute_contributions(module: nn.Module, bench: Bench, rows: int) -> dict[str, Tensor]:
    """Compute the mean square of weight times input, scaled to sum 1 over each dense layer.

    Summed over a layer's outputs, this is the share that one input contributes to the total: for an
    input ``x`` with weight column ``w`` it is proportional to ``E[x^2] * |w|^2``.

    Raises:
        RowsMissing: there are no calibration rows.
    """
    if bench.calibration is None:
        raise RowsMissing("calibration_rows_missing", step="channels")
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    squares = {
        name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()
    }

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = (args[0] if args else named["input"]).reshape(-1, layers[name].in_features)
            squares[name] += x.double().square().sum(dim=0)

        return hook

    handles = [
        layer.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        for batch in batches(bench.calibration, bench.signature, BATCH, rows):
            call_network(module, batch.inputs, bench.signature)
    finally:
        for handle in handles:
            handle.remove()
    contributions = {}
    for name, layer in layers.items():
        energy = layer.weight.double().square() * squares[name]  # (out, in)
        contributions[f"{name}.weight"] = (energy / energy.sum().clamp(min=TINY)).float()
    return contributions
