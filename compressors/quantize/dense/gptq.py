"""Rounding of weights that makes up, in the weights to come, for what was rounded before.

Rounding each weight to its nearest level is best for weights, not for outputs: where inputs go
together, the error of one weight can be undone by the next. Columns are rounded one by one, and the
error of each is spread over those not yet rounded so that the outputs on the calibration rows
change least: second-order compensation as in Optimal Brain Surgeon.

Paper: Frantar et al. 2022, https://arxiv.org/abs/2210.17323 (GPTQ, algorithm 1: inverse Hessian by
Cholesky, updates in blocks of columns). Differs: scales are fitted once, to the weights as trained,
so that columns can go in the order of their inputs' energy, the largest first, whatever block they
are in (the authors' later ``act-order`` with static groups); a column whose input is always zero
is rounded to the nearest; and a row that ended up worse than rounded to the nearest is rounded so.
"""

import torch
from torch import Tensor

from compressors.quantize.calibration.input_moments import squared_error

DAMPING = 0.01
"""Share of the mean energy of inputs that is added to each: the paper's."""
COLUMNS = 128
"""So many columns are rounded before the rest hears of it: the paper's block size."""


def gptq(weight: Tensor, nearest: Tensor, gram: Tensor, scale: Tensor, most: float) -> Tensor:
    """Levels of every weight, counted in scales, that keep a layer's outputs.

    Args:
        weight: float, ``(out, in)``.
        nearest: its nearest levels, float ``(out, in)``.
        gram: of the layer's inputs, float64 ``(in, in)``.
        scale: of every weight, float, ``(out, in)`` or ``(out, 1)``.
        most: the highest level.

    Returns:
        float32 ``(out, in)``, whole numbers in ``-most .. most``. No output's squared error on the
        rows of the gram matrix is larger than with ``nearest``.
    """
    if not bool(gram.any()):  # inputs that are all zero: any levels give the same outputs
        return nearest.float()
    width = scale.double().expand_as(weight)
    left = weight.double().clone()
    order = gram.diagonal().argsort(descending=True, stable=True)
    inverse = _inverse_root(gram[order][:, order])
    left, step = left[:, order], width[:, order]
    found = torch.zeros_like(left)
    inputs = left.shape[1]
    for begin in range(0, inputs, COLUMNS):
        end = min(begin + COLUMNS, inputs)
        missed = torch.zeros_like(left[:, begin:end])  # by how much, in units of the update
        for place in range(begin, end):
            column = left[:, place]
            found[:, place] = (column / step[:, place]).round().clamp(-most, most)
            off = (column - found[:, place] * step[:, place]) / inverse[place, place]
            left[:, place:end] -= off[:, None] * inverse[place, place:end]
            missed[:, place - begin] = off
        left[:, end:] -= missed @ inverse[begin:end, end:]
    steps = torch.zeros_like(found)
    steps[:, order] = found
    worse = squared_error(steps * width - weight, gram) > squared_error(
        nearest.double() * width - weight, gram
    )
    return torch.where(worse[:, None], nearest.double(), steps).float()


def _inverse_root(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a gram matrix, dampened; float64."""
    energy = gram.diagonal()
    # An input that is always zero then stands alone on its diagonal: it gets and gives nothing.
    added = torch.full_like(energy, DAMPING * float(energy.mean()))
    factor = torch.linalg.cholesky(gram + torch.diag(added))
    root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return root
