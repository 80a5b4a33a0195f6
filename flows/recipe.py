"""A recipe carried out: the steps in order, and what each of them was worth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from compressors.contracts import Artifact, Part
from compressors.errors import CompressionError
from compressors.step import needs
from compressors.steps import AnyStep
from flows.order import Order
from infra.bundle import SplitName
from tasks.announce import Progress
from tasks.compress import compress as compress_step
from tasks.documents import AS_TRAINED, Idle, PreparedRows, Ranking, Scored
from tasks.policy import kept, remembered
from tasks.prepare import prepare
from tasks.rank import rank
from tasks.score import score
from tasks.stages import weigh
from tasks.stored import store
from tasks.subject import Subject

T = TypeVar("T")


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

    Raises:
        CompressionError: as ``through``.
    """

    def attempt(step: AnyStep, source: Artifact) -> Artifact | Idle:
        progress.stage(step.kind)
        return _made(order, step, source, subject, bundle, code)

    return Compressed(*through(order, subject, bundle, attempt))


def through(
    order: Order, subject: Subject, begin: T, attempt: Callable[[AnyStep, T], T | Idle]
) -> tuple[tuple[tuple[str, T], ...], dict[str, str]]:
    """Go through the groups of an order's steps, really or in outline.

    A preset is written for models of any make, so a group of its steps that fits nothing here is
    left out whole, with the reason; in a recipe of one's own that is an error.

    Args:
        order: whose steps.
        subject: the bundle they are for.
        begin: what the first step gets.
        attempt: what a step makes of what the one before it made.

    Returns:
        Every stage from ``begin`` on, and the steps that were left out with why.

    Raises:
        CompressionError: a step of preset ``custom`` has nothing to do or lacks data, or no step
            of another preset fits.
    """
    stages = [(AS_TRAINED, begin)]
    idle: dict[str, str] = {}
    for group in order.groups():
        done: list[tuple[str, T]] = []
        why = next(filter(None, (lacking(step, subject) for step in group)), None)
        for step in group if why is None else ():
            made = attempt(step, (stages + done)[-1][1])
            if isinstance(made, Idle):
                why = made.reason
                break
            done.append((step.kind, made))
        if why is None:
            stages += done
        elif order.preset == "custom":
            raise CompressionError(why)
        else:
            idle.update(dict.fromkeys((step.kind for step in group), why))
    if len(stages) == 1:
        raise CompressionError(
            f"No step of preset {order.preset!r} fits this model: {'; '.join(idle.values())}"
        )
    return tuple(stages), idle


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


def _made(
    order: Order, step: AnyStep, source: Artifact, subject: Subject, bundle: Artifact, code: str
) -> Artifact | Idle:
    """The result of one step, if it is an artifact one that is still stored."""
    made: Artifact | Idle = remembered(
        compress_step,
        lambda result: isinstance(result, Idle) or store().manifest(result),
        source=source,
        step=step,
        splits=_splits(step, subject, bundle, code),
        original=bundle,
        seed=order.seed,
        code=code,
    )
    return made


def lacking(step: AnyStep, subject: Subject) -> str | None:
    """What a step needs and the bundle does not bring, before anything has run."""
    if subject.task == "retrieval" and "validation" in needs(step):
        return f"{step.kind!r} trains, and for task 'retrieval' there is no loss yet. Leave it out."
    wanted = dict.fromkeys(split_name(part, subject) for part in needs(step))
    missing = [split for split in wanted if split not in subject.rows]
    if not missing:
        return None
    return (
        f"{step.kind!r} needs {' and '.join(missing)} data; this model has "
        f"{', '.join(subject.rows) or 'none'}. Add it to model.json and pack again, or leave the "
        f"step out."
    )


def split_name(part: Part, subject: Subject) -> SplitName:
    """The split a part of the bench is made from."""
    if part == "soft_labels":
        return "train"
    return subject.calibration() if part == "calibration" else part


def _splits(step: AnyStep, subject: Subject, bundle: Artifact, code: str) -> dict[Part, Artifact]:
    """What a step may look at, and no more, so that nothing else is part of its cache key."""
    splits: dict[Part, Artifact] = {}
    for part in needs(step):
        prepared = kept(prepare, bundle=bundle, split=split_name(part, subject), code=code)
        if part == "soft_labels":
            rows = subject.rows["train"]
            splits[part] = kept(score, bundle=bundle, split=prepared, rows=rows, code=code)
        else:
            splits[part] = prepared
    return splits
