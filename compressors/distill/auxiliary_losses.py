"""Auxiliary distillation losses: hint projections and an auxiliary head, discarded after training.

Hints: what layers inside the original give out is shown to the student's layers of the same name,
through a linear map each, since the student's may be narrower.
A head: a linear layer on top of one layer learns the teacher's answers in place of the network's
own output, which then learns the labels alone. The layers below learn from both, and a teacher
that is biased or badly calibrated does not bend the output.

Sources: Romero et al. 2015, https://arxiv.org/abs/1412.6550 (FitNets; differs: hints and answers
are learned at once, all hinted layers, the gap relative to the teacher's own size so that its
weight means the same everywhere); Khani et al. 2024, https://arxiv.org/abs/2408.14678 (teacher
labels learned as a task of their own; differs: a linear head on a layer that is named).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.core.batches import Batch
from compressors.distill.training.trainer import Loss
from compressors.errors.steps import DistillationRefused

TINY = 1e-12  # of a layer that gives nothing but zeros


class AuxiliaryLosses(nn.Module):
    """Linear maps of hints and a head, and what they need of one forward pass.

    Args:
        hints: layers that both networks have, by name.
        auxiliary: the layer under the head, or None.
        widths: of the last dimension of what each named layer of the student gives.
        known: the same of the teacher's.
        seed: of the first weights.
    """

    def __init__(
        self,
        hints: tuple[str, ...],
        auxiliary: str | None,
        widths: dict[str, int],
        known: dict[str, int],
        seed: int,
    ) -> None:
        super().__init__()
        self.hints, self.auxiliary = hints, auxiliary
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.maps = nn.ModuleList(nn.Linear(widths[name], known[name]) for name in hints)
            self.head = None if auxiliary is None else nn.Linear(widths[auxiliary], 1)
        self.seen: dict[str, Tensor] = {}

    def predictions(self) -> Tensor:
        """The head's predictions for the rows of the student's last forward pass, ``(rows,)``."""
        if self.head is None or self.auxiliary is None:
            raise DistillationRefused("auxiliary_head_missing")
        found: Tensor = self.head(self.seen[self.auxiliary].float()).reshape(-1)
        return found

    def gap(self, shown: dict[str, Tensor]) -> Tensor:
        """How far the student's hinted layers are from the teacher's: a scalar.

        The mean over layers of the squared gap after the map, relative to the squared size of
        what the teacher's layer gives for the batch.
        """
        gaps = []
        for name, translate in zip(self.hints, self.maps, strict=True):
            wanted = shown[name].float()
            own = translate(self.seen[name].float())
            if own.shape != wanted.shape:
                raise DistillationRefused(
                    "hint_shapes_differ",
                    layer=name,
                    student=tuple(own.shape),
                    original=tuple(wanted.shape),
                )
            gaps.append(F.mse_loss(own, wanted) / wanted.square().mean().clamp(min=TINY))
        return torch.stack(gaps).mean()


@contextmanager
def record_outputs(module: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """What named layers gave out in the latest forward pass, by name.

    Raises:
        CompressionError: a layer is not there.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = output

        return hook

    require_layers(module, names)
    handles = [module.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def require_layers(module: nn.Module, names: tuple[str, ...], where: str = "network") -> None:
    """Refuse a name that no layer has.

    Raises:
        CompressionError: names it and those there are.
    """
    known = [name for name, _ in module.named_modules() if name]
    for name in names:
        if name not in known:
            raise DistillationRefused(
                "layer_missing", layer=name, network=where, layers=tuple(known)
            )


@torch.no_grad()
def widths_of(
    module: nn.Module, names: tuple[str, ...], batch: Batch, head: str | None = None
) -> dict[str, int]:
    """The last dimension of what each named layer gives out; a head's must have no other but rows.

    Raises:
        CompressionError: it gives no float tensor of two dimensions or more.
    """
    with record_outputs(module.eval(), names) as seen:
        module(**batch.inputs)
    for name in names:
        given = seen.get(name)
        if (
            not isinstance(given, Tensor)
            or not given.is_floating_point()
            or given.dim() < 2
            or (name == head and given.dim() > 2)
        ):
            found = type(given).__name__
            if isinstance(given, Tensor):
                found = f"{given.dtype} of shape {tuple(given.shape)}"
            raise DistillationRefused("layer_output_unusable", layer=name, got=found)
    return {name: seen[name].shape[-1] for name in names}


def with_hint_loss(
    loss: Loss,
    auxiliary: AuxiliaryLosses,
    original: nn.Module,
    hints: tuple[str, ...],
    share: float,
) -> Loss:
    """A loss with the gap between the student's layers and the original's added to it.

    The original is asked about every batch anew, since what its layers give takes more room than
    the rows; its tensors are only read.
    """

    def whole(output: Tensor, batch: Batch, numbers: Tensor) -> Tensor:
        with torch.no_grad(), record_outputs(original, hints) as shown:
            original(**batch.inputs)
        return loss(output, batch, numbers) + share * auxiliary.gap(shown)

    return whole
