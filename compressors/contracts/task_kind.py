"""The class ``TaskKind``, the properties of a kind of model output, and the registry of task kinds.

Losses and score checks of a task kind are in ``compressors/task_kinds``; a score check finds
problems of the uncompressed model's scores, such as an AUC below 0.5. To add a task kind, write a
``TaskKind`` and the class of its functions, and call ``register``.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from compressors.contracts.named_object import named_object
from compressors.contracts.value_errors import value_error

OutputForm = Literal["logit", "probability", "score"]
"""Form of a model's output: logit or probability of label 1, or a score (higher is better)."""

Labels = Literal["clicks", "grades"]
"""Values of labels: ``clicks`` are 0 or 1; ``grades`` are relevance, at least 0."""

Evaluation = Literal["rows", "queries"]
"""How a model is evaluated: by one score per row, or by one ranking of the catalogue per query.

The catalogue is the list of all items that can be recommended; a query is a user or a search.
"""

ScoreUnit = Literal["probability", "spread"]
"""Unit of a change of scores; ``spread`` is the standard deviation of the baseline's scores.

The baseline is the uncompressed model.
"""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """Properties of the models of one task kind.

    Attributes:
        name: name in signatures.
        forms: forms that an output of this kind can have.
        labels: values of the labels.
        needs_label: whether the data needs a label column.
        evaluation: how a model is evaluated. A model evaluated by ``queries`` has two towers and a
            catalogue.
        has_lists: whether the loss compares the rows of a group ("list"), so that a batch contains
            whole groups.
        default_metrics: metrics with a number in their names, such as ``ndcg@10``, that every order
            measures. Metrics without a number are measured for every model that has the data for
            them.
        functions: the class with losses and score checks, or its ``module:class``, which is
            imported at first use. Its protocol is in ``compressors/task_kinds/protocol.py``. None
            if models of this kind cannot be trained and their scores are not checked.
    """

    name: str
    forms: tuple[OutputForm, ...]
    labels: Labels
    needs_label: bool
    evaluation: Evaluation
    default_metrics: tuple[str, ...]
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
        """Return the class with losses and score checks, or None; see ``functions``."""
        return named_object(self.functions)


TASK_KINDS: dict[str, TaskKind] = {}
"""Every task kind by its name."""


def register(kind: TaskKind) -> None:
    """Add a task kind.

    Raises:
        ValueError: a task kind has this name already.
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
        default_metrics=(),
        functions="compressors.task_kinds.ctr:Ctr",
    ),
    TaskKind(
        name="ranking",
        forms=("logit", "probability", "score"),
        labels="grades",
        needs_label=True,
        evaluation="rows",
        has_lists=True,
        default_metrics=("ndcg@10",),
        functions="compressors.task_kinds.ranking:Ranking",
    ),
    TaskKind(
        name="retrieval",
        forms=("score",),
        labels="grades",
        needs_label=False,
        evaluation="queries",
        default_metrics=("recall@20", "ndcg@20"),
        functions="compressors.task_kinds.retrieval:Retrieval",
    ),
):
    register(_kind)


def task_kind(name: str) -> TaskKind:
    """Return the task kind with this name.

    Raises:
        KeyError: no task kind has it.
    """
    return TASK_KINDS[name]


def _require_known(name: str) -> str:
    """Return the name of a registered task kind unchanged; raise for another name."""
    if name not in TASK_KINDS:
        raise value_error("task_unknown", task=name, known=tuple(TASK_KINDS))
    return name


class _NameSchema:
    """Adds the names of all task kinds to the JSON schema of a task kind's name."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(TASK_KINDS)}


TaskName = Annotated[str, AfterValidator(_require_known), _NameSchema()]
"""The name of a registered task kind."""
