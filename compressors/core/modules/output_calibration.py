"""Output calibration: a monotone map of a network's output that calibrates its probabilities.

The map is part of the model: it is stored with it, gradients pass through it, and every exported
graph contains it. It is a forward hook and a submodule of the network, so unit names do not change.

Sources: Guo et al. 2017, https://arxiv.org/abs/1706.04599 (temperature); Platt 1999 (slope and
offset of the logit); Zadrozny and Elkan 2002 (isotonic).
"""

from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.errors.steps import StepRefused

RECALIBRATION = "recalibration"
"""Name of the calibration map among the network's submodules."""

# Probabilities are clamped to this range before they become logits, which are infinite for 0 and 1.
SMALLEST_PROBABILITY, LARGEST_PROBABILITY = torch.finfo(torch.float32).tiny, 1 - 2.0**-24


def to_logit(output: Tensor, form: str) -> Tensor:
    """Convert an output to a logit; unless its ``form`` is ``probability``, it already is one."""
    if form != "probability":
        return output
    inside = output.clamp(min=SMALLEST_PROBABILITY, max=LARGEST_PROBABILITY)
    return torch.log(inside) - torch.log(1 - inside)


class Recalibration(nn.Module):
    """Maps a network's output to a calibrated one of the same form (logit or probability).

    The map is linear in the logit, or piecewise linear if ``knots`` is positive.

    Attributes:
        method: the calibration method, for plans and bundles.
        output: the form of the output, ``logit`` or ``probability``.
        knots: number of linear pieces after the first one; 0 for a single line.
        line: float32 ``(2,)``, slope and offset of the first piece, which ends at the first knot.
        bends: float32 ``(2, knots)``, the logit at which each further piece begins (its knot), and
            its slope; None without knots.
    """

    line: Tensor
    bends: Tensor | None

    def __init__(
        self,
        method: str,
        output: str,
        *,
        knots: int = 0,
        line: Tensor | None = None,
        bends: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.method, self.output, self.knots = method, output, knots
        line = torch.empty(2, device="meta") if line is None else line
        self.register_buffer("line", line.to(torch.float32))
        if knots:
            bends = torch.empty(2, knots, device="meta") if bends is None else bends
            self.register_buffer("bends", bends.to(torch.float32))
        else:
            self.bends = None

    def forward(self, output: Tensor) -> Tensor:
        logit = to_logit(output, self.output)
        below = logit if self.bends is None else torch.minimum(logit, self.bends[0, 0])
        calibrated = self.line[0] * below + self.line[1]
        if self.bends is not None:
            # How much of each piece is below the logit. The summed terms only grow with the logit,
            # so that rounding cannot reverse the order of two rows.
            begins, slopes = self.bends
            widths = torch.cat([begins.diff(), begins.new_full((1,), torch.inf)])
            lengths = (logit.unsqueeze(-1) - begins).clamp(min=0).minimum(widths)  # (*, knots)
            calibrated = calibrated + torch.matmul(lengths, slopes)
        return torch.sigmoid(calibrated) if self.output == "probability" else calibrated

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module."""
        settings = {"output": self.output, "knots": self.knots}
        return ModuleRecord(kind="output", format=self.method, settings=settings)


def find_recalibration(module: nn.Module) -> Recalibration | None:
    """Return the calibration map of a network's output, or None."""
    submodule = getattr(module, RECALIBRATION, None)
    return submodule if isinstance(submodule, Recalibration) else None


def attach(module: nn.Module, recalibration: Recalibration) -> None:
    """Attach a calibration map to a network's output, or replace the present one, in place.

    Raises:
        StepRefused: the network has another attribute with the name ``RECALIBRATION``.
    """
    if find_recalibration(module) is None:
        if hasattr(module, RECALIBRATION):
            raise StepRefused(
                "attribute_taken", architecture=type(module).__name__, name=RECALIBRATION
            )
        module.register_forward_hook(_recalibrate)
    module.add_module(RECALIBRATION, recalibration)


def _recalibrate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Apply the calibration map to the output of the network ``module``, as a forward hook."""
    calibrated: Tensor = getattr(module, RECALIBRATION)(output)
    return calibrated
