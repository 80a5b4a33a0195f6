"""Output calibration: a monotone map of a network's output that calibrates its probabilities.

The map is part of the model: it is stored with it, gradients pass through it, and every exported
graph contains it. It is a submodule of the network, so unit names do not change. A forward hook
applies it; if the scores come from another method than ``forward``, ``core/scores.py`` does.
A network with several outputs has a map for each of those that are recalibrated.

Sources: Guo et al. 2017, https://arxiv.org/abs/1706.04599 (temperature); Platt 1999 (slope and
offset of the logit); Zadrozny and Elkan 2002 (isotonic).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        name: the name of the output; None if the network has only one.
        knots: number of linear pieces after the first one; 0 for a single line.
        line: float32 ``(2,)``, slope and offset of the first piece, which ends at the first knot.
        bends: float32 ``(2, knots)``, the logit at which each further piece begins (its knot), and
            its slope; None without knots.
    """

    line: Tensor
    bends: Tensor | None
    is_suspended = False  # whether the forward hook does nothing (``without_recalibration``)

    def __init__(
        self,
        method: str,
        output: str,
        *,
        name: str | None = None,
        knots: int = 0,
        line: Tensor | None = None,
        bends: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.method, self.output, self.name, self.knots = method, output, name, knots
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
        settings: dict[str, Any] = {"output": self.output, "knots": self.knots}
        if self.name is not None:
            settings["name"] = self.name
        return ModuleRecord(kind="output", format=self.method, settings=settings)


class OutputMaps(nn.Module):
    """The calibration maps of a network with several outputs.

    The submodule of a map has the index of its output as name: ``recalibration.0``.
    """

    is_suspended = False  # as in ``Recalibration``

    def __init__(self, maps: Mapping[int, Recalibration]) -> None:
        super().__init__()
        for index, recalibration in sorted(maps.items()):
            self.add_module(str(index), recalibration)

    def forward(self, returned: Any) -> Any:
        """Apply the maps to what a network returned (``core/scores.py`` lists its forms)."""
        maps = {int(index): item for index, item in self.named_children()}
        if isinstance(returned, Mapping):
            changed = {item.name: item(returned[item.name]) for item in maps.values()}
            return {**returned, **changed}
        columns = list(returned.unbind(dim=1) if isinstance(returned, Tensor) else returned)
        for index, item in maps.items():
            columns[index] = item(columns[index])
        return torch.stack(columns, dim=1) if isinstance(returned, Tensor) else tuple(columns)


def find_recalibration(module: nn.Module) -> Recalibration | OutputMaps | None:
    """Return the calibration map of a network's output, or the maps of its outputs, or None."""
    submodule = getattr(module, RECALIBRATION, None)
    return submodule if isinstance(submodule, Recalibration | OutputMaps) else None


def list_recalibrations(module: nn.Module) -> tuple[Recalibration, ...]:
    """Return the calibration maps of a network's outputs."""
    recalibration = find_recalibration(module)
    parts = () if recalibration is None else recalibration.modules()
    return tuple(part for part in parts if isinstance(part, Recalibration))


def attach(module: nn.Module, recalibration: Recalibration | OutputMaps) -> None:
    """Attach a calibration map, or those of several outputs, or replace the present one, in place.

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


@contextmanager
def without_recalibration(module: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Suspend the calibration maps of a network inside the context; yield them as a function.

    It is for networks whose scores come from another method than ``forward``: that method may call
    ``forward``, whose results are other values than the scores.
    """
    maps = find_recalibration(module)
    if maps is None:
        yield lambda returned: returned
        return
    maps.is_suspended = True
    try:
        yield maps
    finally:
        maps.is_suspended = False


def _recalibrate(module: nn.Module, args: Any, output: Any) -> Any:
    """Apply the calibration maps to what the network ``module`` returned, as a forward hook."""
    maps = getattr(module, RECALIBRATION)
    return output if maps.is_suspended else maps(output)
