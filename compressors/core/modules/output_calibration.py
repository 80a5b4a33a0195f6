"""A monotone map behind a network's output, so that its probabilities mean what they say.

The map is part of the model: it is stored with it, trained through, and written into every graph.
It is a forward hook of the network and a module inside it, so that nothing a unit is called by
changes.

Sources: Guo et al. 2017, https://arxiv.org/abs/1706.04599 (temperature); Platt 1999 (slope and
offset of the logit); Zadrozny and Elkan 2002 (isotonic).
"""

from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.errors.steps import StepRefused

NAME = "recalibration"
# The least and the greatest probability that float32 tells from 0 and 1: logits stay finite.
LEAST, GREATEST = torch.finfo(torch.float32).tiny, 1 - 2.0**-24


def logit_of(output: Tensor, form: str) -> Tensor:
    """An output, a logit or a probability as ``form`` says, as a logit."""
    if form != "probability":
        return output
    inside = output.clamp(min=LEAST, max=GREATEST)
    return torch.log(inside) - torch.log(1 - inside)


class Recalibration(nn.Module):
    """From a network's output to the same, calibrated, in its form (a logit or a probability).

    ``line`` is float32 ``(2,)``: slope and offset of the logit. With ``knots`` the line ends at the
    first of them, and straight pieces follow: ``bends`` float32 ``(2, knots)`` are where each piece
    begins and its slope.
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
        empty = torch.empty(2, device="meta") if line is None else line
        self.register_buffer("line", empty.to(torch.float32))
        if knots:
            wide = torch.empty(2, knots, device="meta") if bends is None else bends
            self.register_buffer("bends", wide.to(torch.float32))
        else:
            self.bends = None

    def forward(self, output: Tensor) -> Tensor:
        logit = logit_of(output, self.output)
        below = logit if self.bends is None else torch.minimum(logit, self.bends[0, 0])
        found = self.line[0] * below + self.line[1]
        if self.bends is not None:
            # How far each piece is walked along: what is added up only grows with the logit, so
            # that rounding cannot turn the order of two rows round.
            begins, slopes = self.bends
            widths = torch.cat([begins.diff(), begins.new_full((1,), torch.inf)])
            along = (logit.unsqueeze(-1) - begins).clamp(min=0).minimum(widths)  # (*, knots)
            found = found + torch.matmul(along, slopes)
        return torch.sigmoid(found) if self.output == "probability" else found

    def record(self) -> ModuleRecord:
        """What a bundle must say so that this module can be built again."""
        settings = {"output": self.output, "knots": self.knots}
        return ModuleRecord(kind="output", format=self.method, settings=settings)


def recalibration_of(module: nn.Module) -> Recalibration | None:
    """The map behind a network's output, if there is one."""
    found = getattr(module, NAME, None)
    return found if isinstance(found, Recalibration) else None


def attach(module: nn.Module, recalibration: Recalibration) -> None:
    """Put a map behind a network's output, in place of the one it has.

    Raises:
        CompressionError: the network has something else of that name.
    """
    if recalibration_of(module) is None:
        if hasattr(module, NAME):
            raise StepRefused("attribute_taken", architecture=type(module).__name__, name=NAME)
        module.register_forward_hook(_recalibrated)
    module.add_module(NAME, recalibration)


def _recalibrated(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    found: Tensor = getattr(module, NAME)(output)
    return found
