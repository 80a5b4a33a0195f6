"""The type ``Bench``: the data, teachers and settings that a step may use.

A step is one compression method with its settings. A bundle is a trained model as stored files.
"""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from compressors.contracts.artifact import Artifact, Sha256
from compressors.contracts.frozen import Frozen
from compressors.contracts.signature import Signature


class Split(Frozen):
    """One split of the data, stored as tensors on this machine's disk.

    Attributes:
        path: folder of the tensors.
        sha256: hash of the content.
        rows: number of rows.
    """

    path: str
    sha256: Sha256
    rows: int = Field(ge=1)


Part = Literal[
    "train", "calibration", "validation", "soft_labels", "traffic", "traffic_soft_labels", "items"
]
"""Name of a field of ``Bench`` that is a split."""


SOFT_LABELS: tuple[Part, ...] = ("soft_labels", "traffic_soft_labels")
"""Parts with predictions of teachers, for the training rows and for traffic (logged requests)."""


def required_parts(needs: Iterable[Part], *, scores_rows: bool) -> tuple[Part, ...]:
    """Return the parts that a step needs for a model.

    Predictions of teachers are stored for models with one score per row only. For a model with two
    towers, a step computes the vectors of the original network while it trains. Only such a model
    has a catalogue of items.

    Args:
        needs: the parts that the step declares.
        scores_rows: whether the model has one score per row.
    """
    unavailable = ("items",) if scores_rows else SOFT_LABELS
    return tuple(part for part in needs if part not in unavailable)


class Bench(Frozen):
    """The data, teachers and settings that a step may use. It never contains test data.

    Attributes:
        signature: signature of the model.
        train: rows to train on.
        calibration: rows on which a step measures the inputs of dense layers.
        validation: rows on which a step measures the quality of its result.
        teacher: bundle of the original model.
        teachers: bundles of additional teachers.
        soft_labels: the teacher's prediction for every row of ``train``, in the same order: the
            tensor ``score``, float32 ``(rows,)``, or ``(rows, outputs)`` for several outputs. It is
            a logit, probability or score as in the signature. If there are ``teachers``, it is the
            mean prediction of all teachers.
        traffic: logged requests, which have no labels.
        traffic_soft_labels: the same as ``soft_labels``, for the rows of ``traffic``.
        items: the catalogue of a model with two towers: one row per item.
        checkpoints: folder of this machine where a long step keeps its progress; None for none.
        seed: seed of a step's random numbers.
        device: torch device on which a step trains.
        seconds: time budget of one step; None for no limit.
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
    items: Split | None = None
    checkpoints: str | None = Field(
        None, description="A folder of this machine where a long step keeps its progress."
    )
    seed: int = 0
    device: str = "cpu"
    seconds: float | None = Field(None, gt=0, description="Time budget of one step.")
