"""A recipe carried out: the steps in order, and what each of them was worth."""

import logging
from dataclasses import dataclass

from compressors.contracts import Artifact, Part
from compressors.errors import CompressionError, NothingToCompress
from compressors.step import needs
from compressors.steps import AnyStep
from flows.order import Order
from infra.bundle import SplitName
from tasks.announce import Progress
from tasks.compress import compress as compress_step
from tasks.documents import AS_TRAINED, PreparedRows, Ranking, Scored
from tasks.policy import kept
from tasks.prepare import prepare
from tasks.rank import rank
from tasks.score import score
from tasks.stages import weigh
from tasks.subject import Subject

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compressed:
    """What a recipe came to: every stage from the untouched model on, and idle steps with why."""

    stages: tuple[tuple[str, Artifact], ...]
    idle: dict[str, str]

    @property
    def bundle(self) -> Artifact:
        """The last stage."""
        return self.stages[-1][1]


def carry_out(
    order: Order, subject: Subject, bundle: Artifact, code: str, progress: Progress
) -> Compressed:
    """Apply every step of an order to a pulled bundle.

    A preset is written for models of any make, so a group of its steps that fits nothing here is
    left out whole, with the reason; in a recipe of one's own that is an error.

    Raises:
        NothingToCompress: a step of preset ``custom`` has nothing to do, or lacks data.
        CompressionError: no step of the preset fits.
    """
    stages = [(AS_TRAINED, bundle)]
    idle: dict[str, str] = {}
    for group in order.groups():
        done: list[tuple[str, Artifact]] = []
        try:
            for step in group:
                _need_rows(step, subject)
            for step in group:
                progress.stage(step.kind)
                source = (stages + done)[-1][1]
                made = kept(
                    compress_step,
                    source=source,
                    step=step,
                    splits=_splits(step, subject, bundle, code),
                    original=bundle,
                    seed=order.seed,
                    code=code,
                )
                done.append((step.kind, made))
        except NothingToCompress as fault:
            if order.preset == "custom":
                raise
            for step in group:
                log.warning("%s has nothing to do in this model: %s", step.kind, fault)
                idle[step.kind] = str(fault)
            continue
        stages += done
    if len(stages) == 1:
        raise CompressionError(
            f"No step of preset {order.preset!r} fits this model: {'; '.join(idle.values())}"
        )
    return Compressed(tuple(stages), idle)


def weighed(
    compressed: Compressed,
    subject: Subject,
    test: Artifact,
    ranking: Ranking | None,
    seed: int,
    code: str,
) -> Artifact:
    """Every stage's quality on the test rows, for the report; nothing is chosen by it."""
    rows = subject.rows["test"]

    def answers(bundle: Artifact) -> Artifact:
        if ranking is None:
            return kept(score, bundle=bundle, split=test, rows=rows, code=code)
        asked = PreparedRows(artifact=test, rows=rows)
        return kept(rank, bundle=bundle, test=asked, ranking=ranking, code=code)

    scored = tuple(
        Scored(step=step, bundle=bundle, score=answers(bundle))
        for step, bundle in compressed.stages
    )
    return kept(
        weigh,
        scored=scored,
        metric=subject.metric,
        test=test,
        test_rows=rows,
        seed=seed,
        code=code,
    )


def ranking_of(subject: Subject, bundle: Artifact, code: str) -> Ranking | None:
    """What a retrieval model is ranked on beside the test rows; None for other tasks."""
    if subject.task != "retrieval":
        return None

    def rows_of(split: SplitName) -> PreparedRows:
        prepared = kept(prepare, bundle=bundle, split=split, code=code)
        return PreparedRows(artifact=prepared, rows=subject.rows[split])

    earlier: tuple[SplitName, ...] = ("train", "calibration", "validation")
    seen = tuple(rows_of(split) for split in earlier if split in subject.rows)
    return Ranking(items=rows_of("items"), seen=seen)


def _need_rows(step: AnyStep, subject: Subject) -> None:
    """Refuse a step whose rows the bundle does not bring, before anything before it has run.

    Raises:
        NothingToCompress: names what is missing.
    """
    wanted = dict.fromkeys(_split_of(part, subject) for part in needs(step))
    missing = [split for split in wanted if split not in subject.rows]
    if missing:
        raise NothingToCompress(
            step=step.kind,
            wanted=f"{' and '.join(missing)} data",
            closest=", ".join(subject.rows) or "none",
            remedy="Add it to model.json and pack again, or leave the step out.",
        )


def _split_of(part: Part, subject: Subject) -> SplitName:
    """The split a part of the bench is made from."""
    if part == "soft_labels":
        return "train"
    return subject.calibration() if part == "calibration" else part


def _splits(step: AnyStep, subject: Subject, bundle: Artifact, code: str) -> dict[Part, Artifact]:
    """What a step may look at, and no more, so that nothing else is part of its cache key."""
    splits: dict[Part, Artifact] = {}
    for part in needs(step):
        prepared = kept(prepare, bundle=bundle, split=_split_of(part, subject), code=code)
        if part == "soft_labels":
            rows = subject.rows["train"]
            splits[part] = kept(score, bundle=bundle, split=prepared, rows=rows, code=code)
        else:
            splits[part] = prepared
    return splits
