"""GPTQ: round weights column by column and compensate each error in the remaining columns.

Rounding each weight to its nearest level minimizes the error of the weights, not of the outputs: if
inputs are correlated, a change of another weight can compensate the error of the first. Columns are
rounded one by one. After each, the columns not yet rounded are changed so that the outputs on the
calibration rows change least (second-order compensation, as in Optimal Brain Surgeon).

Paper: Frantar et al. 2022, https://arxiv.org/abs/2210.17323 (GPTQ, algorithm 1: inverse Hessian by
Cholesky, updates in blocks of columns). Differs: scales are fitted once, to the trained weights.
Therefore columns can be processed in descending order of the mean square of their input, also if
groups of columns have different scales (the authors' later ``act-order`` with static groups). A
column whose input is always zero is rounded to the nearest level. If the error of an output channel
is larger than with nearest rounding, the whole channel is rounded to the nearest levels.
"""

import torch
from torch import Tensor

from compressors.quantize.calibration.input_moments import squared_error

DAMPING = 0.01
"""Added to each diagonal entry, as a share of the diagonal's mean; the paper's value."""

COLUMNS = 128
"""Columns that are rounded before later columns are updated; the paper's block size."""


def gptq(
    weight: Tensor, nearest: Tensor, gram: Tensor, scale: Tensor, max_multiple: float
) -> Tensor:
    """Round weights to multiples of the scale so that a layer's outputs change least.

    Args:
        weight: float, ``(out, in)``.
        nearest: each weight divided by its scale and rounded to the nearest multiple: integers, as
            float ``(out, in)``.
        gram: Gram matrix of the layer's inputs, float64 ``(in, in)``.
        scale: scale of each weight, float, ``(out, in)`` or ``(out, 1)``.
        max_multiple: the largest multiple that the format can store.

    Returns:
        float32 ``(out, in)``, integers in ``-max_multiple .. max_multiple``. No output's squared
        error on the rows of the Gram matrix is larger than with ``nearest``.
    """
    if not bool(gram.any()):  # all inputs are zero, so any weights give the same outputs
        return nearest.float()
    scales = scale.double().expand_as(weight)
    # Columns are processed in descending order of the mean square of their input.
    permutation = gram.diagonal().argsort(descending=True, stable=True)
    inverse_root = _compute_inverse_root(gram[permutation][:, permutation])
    # The weights not yet rounded, with the compensation of the errors so far.
    remaining, ordered_scales = weight.double().clone()[:, permutation], scales[:, permutation]
    rounded = torch.zeros_like(remaining)
    inputs = remaining.shape[1]
    for begin in range(0, inputs, COLUMNS):
        end = min(begin + COLUMNS, inputs)
        # Each error is divided by its diagonal entry of ``inverse_root``.
        errors = torch.zeros_like(remaining[:, begin:end])
        for index in range(begin, end):
            column, column_scale = remaining[:, index], ordered_scales[:, index]
            rounded[:, index] = (column / column_scale).round().clamp(-max_multiple, max_multiple)
            error = (column - rounded[:, index] * column_scale) / inverse_root[index, index]
            remaining[:, index:end] -= error[:, None] * inverse_root[index, index:end]
            errors[:, index - begin] = error
        remaining[:, end:] -= errors @ inverse_root[begin:end, end:]
    multiples = torch.zeros_like(rounded)
    multiples[:, permutation] = rounded
    worse = squared_error(multiples * scales - weight, gram) > squared_error(
        nearest.double() * scales - weight, gram
    )
    return torch.where(worse[:, None], nearest.double(), multiples).float()


def _compute_inverse_root(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped Gram matrix, float64."""
    squares = gram.diagonal()
    # The row and column of an input that is always zero have only the added diagonal entry, so
    # its weights compensate no error and cause none.
    added = torch.full_like(squares, DAMPING * float(squares.mean()))
    factor = torch.linalg.cholesky(gram + torch.diag(added))
    root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return root
