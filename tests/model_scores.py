"""Scores of a model on fixed rows, their float32 rounding error, and bytes of tensors.

A ``Reference`` is the class, arguments and signature of a test network.
"""

import models
import torch
from models import Reference
from torch import Tensor

from compressors.core.model import Model


def scores_of(model: Model, reference: Reference, rows: int = 300) -> Tensor:
    """Return the scores float32 ``(rows,)`` of a model on example rows of its reference."""
    inputs = models.generate_inputs(reference.signature, reference.rows_of_tables(), rows, seed=11)
    with torch.no_grad():
        return model.module(**inputs).reshape(-1)


def float32_rounding(scores: Tensor) -> float:
    """Return the tolerance for sums of about 100 float32 products in another order.

    It is 64 times the float32 epsilon, relative to the largest score (or to 1, if that is larger).
    """
    return 64 * torch.finfo(torch.float32).eps * max(1.0, float(scores.abs().max()))


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
