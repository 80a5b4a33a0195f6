"""The data that a step may learn from. Types only."""

from typing import Literal

from pydantic import Field

from compressors.contracts.artifact import Artifact, Sha256
from compressors.contracts.inputs import Frozen
from compressors.contracts.signature import Signature


class Split(Frozen):
    """One part of the data as tensors on this machine's disk, named by its content."""

    path: str
    sha256: Sha256
    rows: int = Field(ge=1)


Part = Literal[
    "train", "calibration", "validation", "soft_labels", "traffic", "traffic_soft_labels"
]

Change = Literal["format", "values", "parts", "output"]


class Bench(Frozen):
    """What a step may learn from. It never holds test data.

    ``soft_labels`` holds what the teacher answers to every row of ``train``, in its order:
    ``score`` float32 ``(rows,)`` in the form of the signature's output; ``traffic_soft_labels`` the
    same for ``traffic``, whose labels mean nothing. With ``teachers`` next to ``teacher`` it is the
    mean of the predictions of all.
    """

    signature: Signature
    train: Split | None = None
    calibration: Split | None = None
    validation: Split | None = None
    teacher: Artifact | None = None
    teachers: tuple[Artifact, ...] = ()
    soft_labels: Split | None = None
    traffic: Split | None = None
    traffic_soft_labels: Split | None = None
    checkpoints: str | None = Field(
        None, description="A folder of this machine where a long step keeps its progress."
    )
    seed: int = 0
    device: str = "cpu"
    seconds: float | None = Field(None, gt=0, description="Time budget of one step.")
