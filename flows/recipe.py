"""A recipe carried out: the steps in order, and what each of them was worth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from compressors.contracts import Artifact, Estimate, Part, digest
from compressors.errors import CompressionError
from compressors.step import needs, wants
from compressors.steps import AnyStep
from flows.order import Order
from infra.bundle import SplitName
from infra.settings import load_settings
from tasks.announce import Progress
from tasks.budget import lost
from tasks.compress import compress as compress_step
from tasks.documents import AS_TRAINED, Idle, PreparedRows, Ranking, Scored
from tasks.policy import kept, remembered
from tasks.prepare import prepare
from tasks.rank import rank
from tasks.score import average, score
from tasks.stages import weigh
from tasks.stored import store
from tasks.subject import Subject
from tasks.teachers import Teacher

T = TypeVar("T")


@dataclass(frozen=True)
class Compressed:
    """What a recipe came to: every stage from the untouched model on, and the steps left out.

    ``idle`` holds why, by the step's place in the recipe.
    """

    stages: tuple[tuple[str, Artifact], ...]
    idle: dict[int, str]

    @property
    def bundle(self) -> Artifact:
        """The last stage."""
        return self.stages[-1][1]

    def left_out(self, order: Order) -> dict[str, str]:
        """Why steps were left out, by what people call them."""
        kinds = [step.kind for step in order.recipe()]
        return {
            kinds[place]
            + (f" (step {place + 1} of the recipe)" if kinds.count(kinds[place]) > 1 else ""): why
            for place, why in self.idle.items()
        }


def carry_out(
    order: Order,
    subject: Subject,
    bundle: Artifact,
    teachers: tuple[Teacher, ...],
    code: str,
    progress: Progress,
) -> Compressed:
    """Apply every step of an order to a pulled bundle.

    Raises:
        CompressionError: as ``through``; or there is a budget, and nothing to measure it on.
    """
    learned: set[str] = set()  # stages that have learned from the teachers, or come from one

    def attempt(step: AnyStep, source: Artifact) -> Artifact | Idle:
        progress.stage(step.kind)
        taught = is_taught(step) or source.sha256 in learned
        heard = teachers if taught else ()
        made = _made(order, step, source, subject, bundle, heard, code)
        if taught and not isinstance(made, Idle):
            learned.add(made.sha256)
        return made

    def spent(now: Artifact) -> str | None:
        return _over_budget(order, subject, bundle, now, code)

    need_budget_rows(order, subject)
    within = None if order.budget is None else spent
    return Compressed(*through(order, subject, bundle, attempt, within))


def need_budget_rows(order: Order, subject: Subject) -> None:
    """Refuse a budget that cannot be measured.

    Raises:
        CompressionError: there are no validation rows, or the task has no score a row.
    """
    if order.budget is None:
        return
    if subject.task == "retrieval":
        raise CompressionError(
            "A budget is weighed on the answers to validation rows, which task 'retrieval' does "
            "not have yet. Leave it out; limits are judged all the same."
        )
    if "validation" not in subject.rows:
        raise CompressionError(
            f"A budget is weighed on validation data; this model has {', '.join(subject.rows)}. "
            f"Add it to model.json and pack again, or leave the budget out."
        )


def through(
    order: Order,
    subject: Subject,
    begin: T,
    attempt: Callable[[AnyStep, T], T | Idle],
    spent: Callable[[T], str | None] | None = None,
) -> tuple[tuple[tuple[str, T], ...], dict[int, str]]:
    """Go through the groups of an order's steps, really or in outline.

    A preset is written for models of any make, so a group of its steps that fits nothing here is
    left out whole, with the reason; in a recipe of one's own that is an error. So is a group that
    costs more quality than the budget has left, and with it all later ones that begin with the
    same method on the same units: what cuts deeper would cost more.

    Args:
        order: whose steps.
        subject: the bundle they are for.
        begin: what the first step gets.
        attempt: what a step makes of what the one before it made.
        spent: why what a group came to is over the budget; None if it is within.

    Returns:
        Every stage from ``begin`` on, and why steps were left out, by their place in the recipe.

    Raises:
        CompressionError: a step of preset ``custom`` has nothing to do or lacks data, and none
            before it was over the budget, which it may have been for; or no step fits at all.
    """
    stages = [(AS_TRAINED, begin)]
    idle: dict[int, str] = {}
    over: dict[str, str] = {}
    number = 0
    for group in order.groups():
        places, number = range(number, number + len(group)), number + len(group)
        if (told := over.get(_what(group[0]))) is not None:
            idle.update(dict.fromkeys(places, told))
            continue
        done: list[tuple[str, T]] = []
        why = next(filter(None, (lacking(step, subject) for step in group)), None)
        for step in group if why is None else ():
            made = attempt(step, (stages + done)[-1][1])
            if isinstance(made, Idle):
                why = made.reason
                break
            done.append((step.kind, made))
        if why is None and spent is not None and (told := spent(done[-1][1])) is not None:
            over[_what(group[0])] = told
            idle.update(dict.fromkeys(places, told))
        elif why is None:
            stages += done
        elif order.preset == "custom" and not over:
            raise CompressionError(why)
        else:
            idle.update(dict.fromkeys(places, why))
    if len(stages) == 1:
        reasons = "; ".join(dict.fromkeys(idle.values()))
        raise CompressionError(f"No step of preset {order.preset!r} fits this model: {reasons}")
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


def _what(step: AnyStep) -> str:
    """A method and the tables or layers it works on."""
    return step.model_dump_json(include={"kind", "tables", "layers"})


def _over_budget(
    order: Order, subject: Subject, bundle: Artifact, now: Artifact, code: str
) -> str | None:
    """Why what was made is over the order's budget; None if it is within."""
    rows = subject.rows["validation"]
    split = kept(prepare, bundle=bundle, split="validation", code=code)
    original, made = (
        Scored(
            step=word, bundle=it, score=kept(score, bundle=it, split=split, rows=rows, code=code)
        )
        for word, it in ((AS_TRAINED, bundle), ("now", now))
    )
    found: Estimate = remembered(
        lost,
        original=original,
        now=made,
        metric=subject.metric,
        validation=split,
        rows=rows,
        seed=order.seed,
        code=code,
    )
    if order.budget is None or found.point <= order.budget:
        return None
    return (
        f"the model would have lost {found.point:.5f} of {subject.metric} on validation rows; the "
        f"budget is {order.budget:g}"
    )


def _made(
    order: Order,
    step: AnyStep,
    source: Artifact,
    subject: Subject,
    bundle: Artifact,
    teachers: tuple[Teacher, ...],
    code: str,
) -> Artifact | Idle:
    """The result of one step, if it is an artifact one that is still stored."""
    made: Artifact | Idle = remembered(
        compress_step,
        lambda result: isinstance(result, Idle) or store().manifest(result),
        source=source,
        step=step,
        splits=_splits(step, subject, bundle, teachers, code),
        original=bundle,
        teachers=tuple(teacher.artifact for teacher in teachers),
        seed=order.seed,
        # Training elsewhere ends with other bits; all else is the same wherever it is done.
        device=load_settings().device if "validation" in needs(step) else "cpu",
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


def looked_at(step: AnyStep, subject: Subject) -> tuple[Part, ...]:
    """The parts a step needs, and of those it would make use of the ones that are there."""
    there = (part for part in wants(step) if split_name(part, subject) in subject.rows)
    return (*needs(step), *there)


SOFT_LABELS: tuple[Part, ...] = ("soft_labels", "traffic_soft_labels")


def is_taught(step: AnyStep) -> bool:
    """Whether a step learns from what teachers answer."""
    return any(part in SOFT_LABELS for part in (*needs(step), *wants(step)))


def need_taught(order: Order) -> None:
    """Refuse teachers whom no step would hear.

    Raises:
        CompressionError: names the steps.
    """
    if order.teachers and not any(map(is_taught, order.recipe())):
        kinds = ", ".join(step.kind for step in order.recipe())
        raise CompressionError(
            f"The order names {len(order.teachers)} teacher(s), and no step of it learns from "
            f"any: it has {kinds}. Add a step such as 'distill', or leave 'teachers' out."
        )


def split_name(part: Part, subject: Subject) -> SplitName:
    """The split a part of the bench is made from."""
    match part:
        case "soft_labels":
            return "train"
        case "traffic_soft_labels":
            return "traffic"
        case "calibration":
            return subject.calibration()
    return part


def _splits(
    step: AnyStep, subject: Subject, bundle: Artifact, teachers: tuple[Teacher, ...], code: str
) -> dict[Part, Artifact]:
    """What a step may look at, and no more, so that nothing else is part of its cache key."""
    splits: dict[Part, Artifact] = {}
    for part in looked_at(step, subject):
        split = split_name(part, subject)
        prepared = kept(prepare, bundle=bundle, split=split, code=code)
        splits[part] = prepared
        if part in SOFT_LABELS:
            rows = subject.rows[split]
            splits[part] = kept(score, bundle=bundle, split=prepared, rows=rows, code=code)
            if teachers:
                others = (
                    kept(
                        score,
                        bundle=teacher.artifact,
                        split=prepared,
                        rows=rows,
                        code=digest([code, teacher.architecture]),
                    )
                    for teacher in teachers
                )
                scores, output = (splits[part], *others), teachers[0].output
                splits[part] = kept(average, scores=scores, output=output, code=code)
    return splits
