"""GPTQ: round weights column by column and compensate each error in the remaining columns.

Rounding each weight to its nearest level minimizes the error of the weights, not of the outputs: if
inputs are correlated, another weight can compensate the error of the first. Columns are rounded one
by one, and the error of each is spread over the columns not yet rounded, so that the outputs on the
calibration rows change least: second-order compensation as in Optimal Brain Surgeon.

Paper: Frantar et al. 2022, https://arxiv.org/abs/2210.17323 (GPTQ, algorithm 1: inverse Hessian by
Cholesky, updates in blocks of columns). Differs: scales are fitted once, to the trained weights, so
that columns can be processed in descending order of their inputs' energy across blocks (the
authors' later ``act-order`` with static groups); a column whose input is always zero is rounded to
the nearest level; and a row whose error is larger than with nearest rounding is rounded to the
nearest levels.
"""

import torch
from torch import Tensor

from compressors.quantize.calibration.input_moments import squared_error

DAMPING = 0.01
"""Share of the inputs' mean energy that is added to each diagonal entry; the paper's value."""

COLUMNS = 128
"""Columns that are rounded before later columns are updated; the paper's block size."""


def gptq(weight: Tensor, nearest: Tensor, gram: Tensor, scale: Tensor, most: float) -> Tensor:
    """Round weights to multiples of the scale so that a layer's outputs change least.

    Args:
        weight: float, ``(out, in)``.
        nearest: the nearest multiple of each weight, float ``(out, in)``.
        gram: Gram matrix of the layer's inputs, float64 ``(in, in)``.
        scale: scale of each weight, float, ``(out, in)`` or ``(out, 1)``.
        most: the largest multiple.

    Returns:
        float32 ``(out, in)``, integers in ``-most .. most``. No output's squared error on the
        rows of the Gram matrix is larger than with ``nearest``.
    """
    if not bool(gram.any()):  # inputs that are all zero: any levels give the same outputs
        return nearest.float()
    scales = scale.double().expand_as(weight)
    order = gram.diagonal().argsort(descending=True, stable=True)
    inverse = _inverse_root(gram[order][:, order])
    # The weights not yet rounded, with the compensation of the errors so far.
    remaining, ordered_scales = weight.double().clone()[:, order], scales[:, order]
    rounded = torch.zeros_like(remaining)
    inputs = remaining.shape[1]
    for begin in range(0, inputs, COLUMNS):
        end = min(begin + COLUMNS, inputs)
        errors = torch.zeros_like(remaining[:, begin:end])  # divided by the diagonal of inverse
        for place in range(begin, end):
            column, column_scale = remaining[:, place], ordered_scales[:, place]
            rounded[:, place] = (column / column_scale).round().clamp(-most, most)
            error = (column - rounded[:, place] * column_scale) / inverse[place, place]
            remaining[:, place:end] -= error[:, None] * inverse[place, place:end]
            errors[:, place - begin] = error
        remaining[:, end:] -= errors @ inverse[begin:end, end:]
    steps = torch.zeros_like(rounded)
    steps[:, order] = rounded
    worse = squared_error(steps * scales - weight, gram) > squared_error(
        nearest.double() * scales - weight, gram
    )
    return torch.where(worse[:, None], nearest.double(), steps).float()


def _inverse_root(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped Gram matrix, float64."""
    energy = gram.diagonal()
    # An input that is always zero gets only a diagonal entry, so it takes part in no compensation.
    added = torch.full_like(energy, DAMPING * float(energy.mean()))
    factor = torch.linalg.cholesky(gram + torch.diag(added))
    root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return root
