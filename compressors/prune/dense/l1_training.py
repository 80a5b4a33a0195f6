"""Train dense layers with an L1 or group penalty, so that many weights become exactly zero.

After every optimizer step the weights are soft-thresholded: they move towards zero by the learning
rate of the step times ``penalty_strength``, and a weight that would cross zero becomes zero. This
is the proximal operator of the penalty. The gradient of a penalty would only make weights small.

Sources: Parikh and Boyd 2014, sec. 6.5 (soft and block soft thresholding); Yuan and Lin 2006 (the
group lasso); Liu et al. 2017, https://arxiv.org/abs/1708.06519 (the scales of batch norms, which
removes channels).
Differs: after Adam the threshold is proportional to the learning rate alone. It is decoupled from
the scale of the gradient, as AdamW's decay is, so that one strength means the same in every
network: a weight stays at zero while the ratio of its mean gradient to its root mean square
gradient is below the strength. A group contains all parameters of one channel: the weights, the
bias, and the scale and shift of the norm after it. If the outputs of several layers are combined
channel by channel (a residual sum), the group contains these weights of all the layers.

Zeros are stored like any other weight, so this step alone lowers neither bytes nor multiply-adds
nor latency on any target. ``fine_tune`` and ``distill`` keep the zeros; ``channels`` with
importance ``activation`` can remove channels that became zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part, Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit
from compressors.distill.soft_labels import build_mixed_loss
from compressors.distill.training.settings import SoftShare, Temperature, Training
from compressors.distill.training.training_steps import (
    choose_trainable,
    list_pruned_layers,
    train_model,
)
from compressors.prune.structure.channel_consumers import WidthConsumers
from compressors.prune.structure.prunable_widths import prunable_widths


@dataclass(frozen=True)
class WeightGroups:
    """The groups of one layer, or of layers whose outputs are combined channel by channel.

    Attributes:
        count: number of groups, usually one for each channel.
        parts: by parameter name, the penalized indices along its first dimension, and the number of
            the group of each index; both int64 ``(indices,)``.
    """

    count: int
    parts: dict[str, tuple[Tensor, Tensor]]


def soft_threshold(weight: Tensor, threshold: float) -> Tensor:
    """Move weights towards zero by a threshold; weights of smaller size become zero."""
    return weight.sign() * (weight.abs() - threshold).clamp(min=0) + 0.0  # no negative zero


def group_threshold(
    parts: Sequence[tuple[Tensor, Tensor]], count: int, threshold: float
) -> list[Tensor]:
    """Reduce the norm of each group of weights by the threshold times the root of its size.

    Args:
        parts: tensors ``(indices, *)``, each with the group of every index, int64 ``(indices,)``.
        count: number of groups.
        threshold: threshold of a single weight.

    Returns:
        The new tensors; a group whose norm is smaller than the reduction becomes zero.
    """
    square, size = parts[0][0].new_zeros(count), parts[0][0].new_zeros(count)
    for tensor, group_of_index in parts:
        flat = tensor.reshape(len(tensor), -1)
        square.index_add_(0, group_of_index, flat.square().sum(dim=1))
        size.index_add_(0, group_of_index, flat.new_full((len(flat),), flat.shape[1]))
    norm = square.sqrt()
    # A group of zeros stays zero for any factor, so the clamp only avoids a division by zero.
    factor = (1 - threshold * size.sqrt() / norm.clamp(min=1e-30)).clamp(min=0)  # (count,)
    return [
        tensor * factor[group_of_index].reshape(-1, *[1] * (tensor.dim() - 1)) + 0.0
        for tensor, group_of_index in parts
    ]


Penalized = dict[str, Decision]
"""By dense layer, whether it is penalized, and why."""


class L1Training(StepSettings):
    """Train with a penalty on dense weights, so that many become exactly zero."""

    effect: ClassVar[Effect] = "values"  # units keep their format; their weights change
    keeps_zeros: ClassVar[bool] = True  # later training leaves these weights at zero

    kind: Literal["l1_training"] = "l1_training"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to penalize: module names, with * for any characters."
    )
    penalty_strength: float = Field(
        0.3,
        gt=0,
        le=1,
        description="How far each optimizer step moves a weight towards zero, as a multiple of the "
        "learning rate. Adam moves a weight by about 0.2 if gradients are noise and by up to 1 if "
        "all batches agree, so below 0.2 few weights stay at zero.",
    )
    penalty: Literal["l1", "group"] = Field(
        "l1",
        description="l1: single weights become zero. group: all weights that compute an output "
        "channel are penalized together, so that whole channels become zero.",
    )
    soft_share: SoftShare = 0.0  # weight of the original model's predictions in the training loss
    temperature: Temperature = 1.0
    training: Training = Field(
        default_factory=lambda: Training(schedule="cosine"),
        description="Settings of the training. All epochs run, and the result is the last one.",
    )

    @property
    def trains(self) -> bool:
        """Whether the step trains: always."""
        return True

    @property
    def needs(self) -> tuple[Part, ...]:
        """Rows to train on, rows to report the metric on, and soft labels if they are used."""
        return ("train", "validation", *(("soft_labels",) if self.soft_share else ()))

    def plan(self, model: Model, bench: Bench) -> StepPlan[Penalized]:
        """Select the penalized layers and the other trained units; give reasons for all others."""
        penalized = self._select_penalized_layers(model)
        decisions = choose_trainable(model, bench, self.kind, self.training)
        if not any(decision.selected for decision in penalized.values()):
            # Without a penalized layer the step does not train, so every layer is skipped.
            return StepPlan({**decisions, **penalized}, penalized)
        for name, decision in penalized.items():
            if decision.selected:
                part = "weight" if self.penalty == "l1" else "channel"
                penalty = Reason("penalty", strength=self.penalty_strength, part=part)
                reasons = (*decisions[name].reasons, penalty)
                decisions[name] = replace(decisions[name], reasons=reasons)
        return StepPlan(decisions, penalized)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Penalized]) -> AppliedStep:
        """Train with the penalty and return the network of the last epoch.

        Raises:
            RowsMissing: the bench lacks rows or soft labels.
            TrainingFailed: training diverged, or nothing can be trained.
        """
        penalized = plan.payload
        names = [name for name, decision in penalized.items() if decision.selected]
        loss = build_mixed_loss(bench, self.soft_share, self.temperature, self.kind, model.original)
        groups = (
            _find_weight_groups(model, bench.signature, penalized)
            if self.penalty == "group"
            else []
        )
        trained = train_model(
            model,
            bench,
            loss,
            self.training,
            keep_zeros_in=list_pruned_layers(model),
            after_step=_build_threshold_function(
                model.module, names, groups, self.penalty_strength
            ),
            keep_last_epoch=True,  # return the network of the last epoch, not of the best one
        )
        outcomes = dict(trained.outcomes)
        # The zeros take as many bytes as before until a later step prunes them, so the decision on
        # each layer stays deferred.
        for name in names:
            zeros = _zero_reasons(trained.model.module, name, groups)
            outcomes[name] = Decision("deferred", (*zeros, *outcomes[name].reasons))
        return AppliedStep(trained.model, outcomes)

    def _select_penalized_layers(self, model: Model) -> dict[str, Decision]:
        """Select the penalized dense layers; give a reason for each other layer."""
        units = Unit.of(model.module)
        penalized = choose_dense(units, self.layers, self.kind)
        if self.penalty == "group":
            for unit in units:
                if unit.name in penalized and penalized[unit.name].selected and unit.rows == 1:
                    penalized[unit.name] = Decision("skipped", (Reason("single_output"),))
        return penalized


def _build_threshold_function(
    module: nn.Module, layers: Sequence[str], groups: Sequence[WeightGroups], strength: float
) -> Callable[[float], None]:
    """Build the function that thresholds the weights after an optimizer step.

    The function takes the learning rate of the step. It thresholds the groups if there are any,
    else the single weights of the layers.
    """

    def threshold_weights(learning_rate: float) -> None:
        for name in layers:
            weight = module.get_parameter(f"{name}.weight")
            weight.copy_(soft_threshold(weight, learning_rate * strength))

    def threshold_groups(learning_rate: float) -> None:
        for weight_groups in groups:
            weights = {name: module.get_parameter(name) for name in weight_groups.parts}
            parts = [
                (weight[indices], group_of_index.to(weight.device))
                for weight, (indices, group_of_index) in zip(
                    weights.values(), weight_groups.parts.values(), strict=True
                )
            ]
            thresholded = group_threshold(parts, weight_groups.count, learning_rate * strength)
            for (name, (indices, _)), new in zip(
                weight_groups.parts.items(), thresholded, strict=True
            ):
                weights[name][indices] = new

    return threshold_groups if groups else threshold_weights


def _find_weight_groups(
    model: Model, signature: Signature, penalized: Mapping[str, Decision]
) -> list[WeightGroups]:
    """Group the parameters of each prunable channel, and of each output of the other layers."""
    # A width is a setting of the network that counts channels. prunable_widths checks each one by
    # building the network with half of them; here only the resulting groups of channels are used.
    # With ``share_is_searched``, it may check fewer than half.
    prunable = prunable_widths(
        model, signature, penalized, share=0.5, multiple=1, share_is_searched=True
    )
    groups = [
        _group_of_producers(model.module, consumers, producers)
        for consumers in prunable.consumers
        for producers in consumers.tied_producers
    ]
    grouped = {
        producer for consumers in prunable.consumers for producer in consumers.width.producers
    }
    for name, decision in penalized.items():
        if decision.selected and name not in grouped:
            outputs = torch.arange(model.module.get_parameter(f"{name}.weight").shape[0])
            parts = dict.fromkeys(_list_parameter_names(model.module, name), (outputs, outputs))
            groups.append(WeightGroups(len(outputs), parts))
    return groups


def _group_of_producers(
    module: nn.Module, consumers: WidthConsumers, producers: tuple[str, ...]
) -> WeightGroups:
    """Group the parameters of the channels of some producers and of the batch norms after them.

    A producer is a layer that outputs the channels of a width. A group is one channel, or several
    that the width counts as one, such as a head.
    """
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for producer in producers:
        groups = consumers.groups[producer]
        for name in _list_parameter_names(module, producer):
            parts[name] = (torch.arange(len(groups)), groups)
        for (other_producer, consumer), columns in consumers.connections.items():
            # ``columns`` says which inputs of the consumer take which group: bool (groups, inputs).
            if other_producer == producer and isinstance(
                module.get_submodule(consumer), nn.BatchNorm1d
            ):
                indices = columns.any(dim=0).nonzero().flatten()
                group_of_index = columns.int().argmax(dim=0)[indices]
                for name in _list_parameter_names(module, consumer):
                    parts[name] = (indices, group_of_index)
    return WeightGroups(consumers.width.value, parts)


def _list_parameter_names(module: nn.Module, owner: str) -> list[str]:
    """Return the full names of the parameters of a submodule."""
    return [f"{owner}.{name}" for name, _ in module.get_submodule(owner).named_parameters()]


def _zero_reasons(
    module: nn.Module, name: str, groups: Sequence[WeightGroups]
) -> tuple[Reason, ...]:
    """Report the share of zero weights of a layer, and with groups the number of zero outputs."""
    weight = module.get_parameter(f"{name}.weight").detach()
    zeros = Reason("zeros", share=float((weight == 0).float().mean()))
    if not groups:
        return (zeros,)
    count = int((weight == 0).all(dim=1).sum())
    return zeros, Reason("zero_outputs", count=count, outputs=len(weight))
