"""Auxiliary distillation losses: hint projections and an auxiliary head, discarded after training.

Hints: the outputs of hidden layers of the original (the network before compression, here the
teacher) are targets for the student's layers of the same name. A linear projection per layer maps
the student's output, which may have fewer channels, to the teacher's number of channels.

Auxiliary head: a linear layer that receives the output of one hidden layer learns the teacher's
predictions, while the network's output learns only the labels. The layers before the head learn
from both. A biased or badly calibrated teacher does not distort the output.

Sources: Romero et al. 2015, https://arxiv.org/abs/1412.6550 (FitNets). Differs: hints and
predictions are learned at the same time, for all layers with hints; the squared error is divided by
the mean square of the teacher's output, so that one weight fits every layer. Khani et al. 2024,
https://arxiv.org/abs/2408.14678 (teacher labels as a separate task). Differs: the head is linear,
and its layer is named in the settings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Signature
from compressors.core.batches import Batch
from compressors.core.scores import call_network
from compressors.distill.training.trainer import Loss
from compressors.errors.steps import DistillationRefused

MIN_DIVISOR = 1e-12
"""Smallest divisor of a hint loss, for a teacher layer whose output is all zeros."""


class AuxiliaryLosses(nn.Module):
    """Hint projections and an auxiliary head, with the layer outputs of the last forward pass.

    Args:
        hints: names of the layers with hints, which both networks have.
        auxiliary: the layer whose output the head receives, or None.
        student_widths: by layer, the size of the last dimension of the student's output.
        teacher_widths: the same for the teacher.
        seed: seed of the initial weights.
        num_outputs: number of outputs of the model, which the auxiliary head predicts.

    Attributes:
        maps: the hint projections, in the order of ``hints``.
        head: the auxiliary head, or None.
        outputs: by layer, the student's outputs in the last forward pass.
    """

    def __init__(
        self,
        hints: tuple[str, ...],
        auxiliary: str | None,
        student_widths: dict[str, int],
        teacher_widths: dict[str, int],
        seed: int,
        num_outputs: int = 1,
    ) -> None:
        super().__init__()
        self.hints, self.auxiliary = hints, auxiliary
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.maps = nn.ModuleList(
                nn.Linear(student_widths[name], teacher_widths[name]) for name in hints
            )
            self.head = (
                None if auxiliary is None else nn.Linear(student_widths[auxiliary], num_outputs)
            )
        self.outputs: dict[str, Tensor] = {}

    def predictions(self) -> Tensor:
        """Return the head's predictions for the student's last forward pass.

        They are ``(rows,)``, or ``(rows, outputs)`` for several outputs.

        Raises:
            DistillationRefused: there is no head.
        """
        if self.head is None or self.auxiliary is None:
            raise DistillationRefused("auxiliary_head_missing")
        predictions: Tensor = self.head(self.outputs[self.auxiliary].float())
        return predictions.squeeze(1) if predictions.shape[1] == 1 else predictions

    def hint_loss(self, targets: dict[str, Tensor]) -> Tensor:
        """Return the distance of the student's layers with hints from the teacher's, a scalar.

        It is the mean over layers of the mean squared difference after the projection, divided by
        the mean square of the teacher layer's output for the batch.

        Args:
            targets: by layer, the teacher's outputs for the same rows.

        Raises:
            DistillationRefused: the shapes of a layer's projected output and of the teacher's
                output differ.
        """
        losses = []
        for name, projection in zip(self.hints, self.maps, strict=True):
            target = targets[name].float()
            projected = projection(self.outputs[name].float())
            if projected.shape != target.shape:
                raise DistillationRefused(
                    "hint_shapes_differ",
                    layer=name,
                    student=tuple(projected.shape),
                    original=tuple(target.shape),
                )
            losses.append(
                F.mse_loss(projected, target) / target.square().mean().clamp(min=MIN_DIVISOR)
            )
        return torch.stack(losses).mean()


@contextmanager
def record_outputs(module: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the named layers while the returned context is active.

    Yields:
        The outputs in the latest forward pass, by layer name.

    Raises:
        DistillationRefused: a layer does not exist.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name] = output

        return hook

    require_layers(module, names)
    handles = [module.get_submodule(n).register_forward_hook(record(n)) for n in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def require_layers(module: nn.Module, names: tuple[str, ...], network: str = "network") -> None:
    """Raise if the network lacks a layer; ``network`` is the network's name in the error.

    Raises:
        DistillationRefused: a layer is missing; the error also names the existing layers.
    """
    known = [name for name, _ in module.named_modules() if name]
    for name in names:
        if name not in known:
            raise DistillationRefused(
                "layer_missing", layer=name, network=network, layers=tuple(known)
            )


@torch.no_grad()
def measure_widths(
    module: nn.Module,
    names: tuple[str, ...],
    batch: Batch,
    signature: Signature,
    head: str | None = None,
) -> dict[str, int]:
    """Measure the size of the last dimension of each named layer's output.

    Args:
        module: the network; it is set to evaluation mode.
        names: names of the layers.
        batch: rows for the forward pass.
        signature: the signature of the network.
        head: the layer whose output the auxiliary head receives, or None. This output must be
            two-dimensional.

    Raises:
        DistillationRefused: an output is not a float tensor of at least two dimensions, or the
            output of ``head`` has more than two.
    """
    with record_outputs(module.eval(), names) as outputs:
        call_network(module, batch.inputs, signature)
    for name in names:
        output = outputs.get(name)
        if (
            not isinstance(output, Tensor)
            or not output.is_floating_point()
            or output.dim() < 2
            or (name == head and output.dim() > 2)
        ):
            description = type(output).__name__
            if isinstance(output, Tensor):
                description = f"{output.dtype} of shape {tuple(output.shape)}"
            raise DistillationRefused("layer_output_unusable", layer=name, got=description)
    return {name: outputs[name].shape[-1] for name in names}


def add_hint_loss(
    loss: Loss,
    auxiliary_losses: AuxiliaryLosses,
    original: nn.Module,
    hints: tuple[str, ...],
    hint_weight: float,
    signature: Signature,
) -> Loss:
    """Return a loss that adds the hint loss, multiplied by ``hint_weight``, to another loss.

    The original is evaluated for every batch, instead of once, because the outputs of its layers
    for all training rows would take more space than these rows. Its tensors are not changed.

    Args:
        loss: the loss without hints.
        auxiliary_losses: the hint projections, with the student's outputs of the last forward pass.
        original: the teacher.
        hints: names of the layers with hints.
        hint_weight: factor of the hint loss; it may be above 1.
        signature: the signature of the teacher.
    """

    def total_loss(output: Tensor, batch: Batch, row_numbers: Tensor) -> Tensor:
        with torch.no_grad(), record_outputs(original, hints) as targets:
            call_network(original, batch.inputs, signature)
        hint_loss = auxiliary_losses.hint_loss(targets)
        return loss(output, batch, row_numbers) + hint_weight * hint_loss

    return total_loss
