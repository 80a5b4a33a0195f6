"""The loss of a network that is taught: the teacher's answers, mixed with the labels.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (soft targets with a temperature).
"""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from compressors.batches import Batch
from compressors.contracts import Bench
from compressors.errors import CompressionError
from compressors.loss import hard_loss, soft_loss
from compressors.training import Loss


def taught_loss(bench: Bench, soft_share: float, temperature: float, kind: str) -> Loss:
    """A loss over training rows.

    Args:
        bench: with ``train`` and what the teacher answers to it.
        soft_share: weight of the teacher's answers against the labels.
        temperature: both answers are divided by it before they are compared.
        kind: of the step that asks.

    Raises:
        CompressionError: there are no soft labels, or not one for every row.
    """
    if bench.train is None or bench.soft_labels is None:
        raise CompressionError(f"{kind!r} needs train rows and soft labels.")
    with safe_open(Path(bench.soft_labels.path) / "data.safetensors", framework="pt") as file:
        teacher = file.get_tensor("score")  # (rows,)
    if len(teacher) != bench.train.rows:
        raise CompressionError(
            f"{kind!r} needs one soft label per training row; found {len(teacher)} for "
            f"{bench.train.rows} rows."
        )

    def loss(output: Tensor, batch: Batch, numbers: Tensor) -> Tensor:
        soft = soft_loss(bench.signature, output, teacher[numbers], batch, temperature)
        hard = hard_loss(bench.signature, output, batch)
        return soft_share * soft + (1 - soft_share) * hard

    return loss
