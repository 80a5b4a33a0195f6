"""What a kind of task declares, and the registry of kinds.

The functions of a kind (losses, checks of scores) are in ``compressors/task_kinds``. To add a kind,
write its declaration and its functions, and add it to ``TASK_KINDS`` or call ``register``.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from compressors.contracts.named_object import named_object
from compressors.contracts.value_errors import value_error

OutputForm = Literal["logit", "probability", "score"]
Labels = Literal["clicks", "grades"]
"""Values of labels: 0 or 1; or relevance, at least 0."""

Evaluation = Literal["rows", "queries"]
"""How a model is evaluated: one score for each row, or a ranking of the catalogue per query."""

ScoreUnit = Literal["probability", "spread"]
"""Unit of a change of scores: probability, or standard deviations of the baseline's scores."""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """Properties of models of one task.

    Attributes:
        name: name in signatures.
        forms: forms that an output of this kind can have.
        labels: values of the label.
        needs_label: whether the data needs a label column.
        evaluation: how a model is evaluated. A model evaluated by ``queries`` has two towers and a
            catalogue, and cannot be trained after compression yet.
        has_lists: whether the loss is computed by list, so that a batch contains whole groups.
        usual: metrics with a number in their names that every order measures. Metrics without a
            number are measured wherever they are possible.
        functions: ``module:class`` of the kind's functions, imported when first used, or the class.
            Its protocol is in ``compressors/task_kinds/protocol.py``. None if models of this kind
            cannot be trained, and their scores not be checked.
    """

    name: str
    forms: tuple[OutputForm, ...]
    labels: Labels
    needs_label: bool
    evaluation: Evaluation
    usual: tuple[str, ...]
    functions: str | type | None
    has_lists: bool = False

    @property
    def scores_rows(self) -> bool:
        """Whether a model has one score for each row, so that rows have a loss and a metric."""
        return self.evaluation == "rows"

    @property
    def predicts_probability(self) -> bool:
        """Whether each output can be converted to the probability of a positive label."""
        return "score" not in self.forms

    @property
    def score_unit(self) -> ScoreUnit:
        """The unit in which changes of scores are measured."""
        return "probability" if self.predicts_probability else "spread"

    def load(self) -> Any:
        """Return the class of the kind's functions, or None; see ``functions``."""
        return named_object(self.functions)


TASK_KINDS: dict[str, TaskKind] = {}
"""Every kind by its name."""


def register(kind: TaskKind) -> None:
    """Add a kind of task.

    Raises:
        ValueError: there is a kind of this name.
    """
    if kind.name in TASK_KINDS:
        raise ValueError(f"task kind {kind.name!r} is already registered")
    TASK_KINDS[kind.name] = kind


for _kind in (
    TaskKind(
        name="ctr",
        forms=("logit", "probability"),
        labels="clicks",
        needs_label=True,
        evaluation="rows",
        usual=(),
        functions="compressors.task_kinds.ctr:Ctr",
    ),
    TaskKind(
        name="ranking",
        forms=("logit", "probability", "score"),
        labels="grades",
        needs_label=True,
        evaluation="rows",
        has_lists=True,
        usual=("ndcg@10",),
        functions="compressors.task_kinds.ranking:Ranking",
    ),
    TaskKind(
        name="retrieval",
        forms=("score",),
        labels="grades",
        needs_label=False,
        evaluation="queries",
        usual=("recall@20", "ndcg@20"),
        functions=None,
    ),
):
    register(_kind)


def task_kind(name: str) -> TaskKind:
    """Return the kind of a name.

    Raises:
        KeyError: there is none.
    """
    return TASK_KINDS[name]


def _known(name: str) -> str:
    if name not in TASK_KINDS:
        raise value_error("task_unknown", task=name, known=tuple(TASK_KINDS))
    return name


class _NameSchema:
    """The JSON schema of a task's name."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(TASK_KINDS)}


TaskName = Annotated[str, AfterValidator(_known), _NameSchema()]
"""The name of a registered kind of task."""
