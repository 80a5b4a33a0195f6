"""The signature of a model: inputs, output, task, label and metric. Types only."""

from collections.abc import Iterable
from typing import Self

from pydantic import Field, ValidationInfo, model_validator

from compressors.contracts.inputs import AnyInput, Frozen, IdInput, tensor_names
from compressors.contracts.metrics import MetricName, metric_problem
from compressors.contracts.task_kind import OutputForm, TaskKind, TaskName, task_kind
from compressors.contracts.value_errors import value_error

ITEMS = "items"
"""The split of a retrieval model that contains its catalogue, one row per item."""

TRAFFIC = "traffic"
"""The split of logged requests: rows without a label, scored by a teacher."""


class Tower(Frozen):
    """One half of a retrieval model: a submodule, and the inputs it is called with by name.

    It returns vectors ``(rows, dim)``, of the same ``dim`` as the other tower's.
    """

    module: str = Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$", description="Its attribute path.")
    inputs: tuple[str, ...] = Field(min_length=1)


class Towers(Frozen):
    """The served parts of a retrieval model: a pair's score is the dot product of both vectors."""

    query: Tower
    item: Tower

    def named(self) -> dict[str, Tower]:
        """Return both towers, by the name of their served graph."""
        return {"query": self.query, "item": self.item}


class Signature(Frozen):
    """Inputs, output, task, label and metric of a model.

    A model is called with its inputs by name and returns ``(rows,)`` or ``(rows, 1)``: a logit
    or a probability for ``ctr``, any score (higher ranks first) for ``ranking`` and
    ``retrieval``.

    ``retrieval`` alone has ``towers``, and ``item``: the input that is the item's id. Its rows
    are interactions of the users in column ``group``; without ``label`` all of them are positive.
    """

    task: TaskName
    inputs: tuple[AnyInput, ...] = Field(min_length=1)
    output: OutputForm
    label: str | None = None
    group: str | None = None
    time: str | None = None
    metric: MetricName
    towers: Towers | None = None
    item: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [name for item in self.inputs for name in tensor_names(item)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise value_error("inputs_repeated", names=tuple(repeated))
        kind = self.task_kind
        if self.output not in kind.outputs:
            raise value_error("output_form", task=self.task, forms=kind.outputs, got=self.output)
        if kind.needs_label and self.label is None:
            raise value_error("label_missing", task=self.task)
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self, info: ValidationInfo) -> Self:
        """Refuse a metric that is not measured for the task, except in stored bundles."""
        stored = isinstance(info.context, dict) and info.context.get("stored")
        problem = metric_problem(self.task, self.metric, grouped=self.group is not None)
        if problem is not None and not stored:
            raise value_error("metric_not_measured", reason=problem)
        return self

    @model_validator(mode="after")
    def _towers_fit(self) -> Self:
        if self.task_kind.scores_rows:
            if self.towers is not None or self.item is not None:
                raise value_error("towers_unexpected", task=self.task)
            return self
        if self.towers is None or self.item is None:
            raise value_error("towers_missing", task=self.task)
        read = (*self.towers.query.inputs, *self.towers.item.inputs)
        known = {entry.name: entry for entry in self.inputs}
        if sorted(read) != sorted(known):
            raise value_error(
                "tower_inputs_differ", inputs=tuple(sorted(known)), read=tuple(sorted(read))
            )
        if self.item not in self.towers.item.inputs:
            raise value_error("item_not_in_tower", item=self.item)
        item = known[self.item]
        if not isinstance(item, IdInput) or item.shape:
            raise value_error("item_no_single_id", item=self.item)
        return self

    @property
    def task_kind(self) -> TaskKind:
        """What the kind of task declares."""
        return task_kind(self.task)

    def only(self, names: Iterable[str]) -> Self:
        """Return the signature with only these inputs, in unchanged order."""
        selected = set(names)
        return self.model_copy(
            update={"inputs": tuple(item for item in self.inputs if item.name in selected)}
        )

    def of_split(self, split: str) -> Self:
        """Return the signature of the files of one split.

        That is the whole signature, except for ``retrieval``: there ``items`` contains the inputs
        of the item tower, one row per item, and the other splits contain the inputs of the query
        tower and the item's id. ``traffic`` has no label.
        """
        if split == TRAFFIC and self.label is not None:
            return self.model_copy(update={"label": None}).of_split(split)
        if self.towers is None or self.item is None:
            return self
        if split == ITEMS:
            plain = {"label": None, "group": None, "time": None}
            return self.only(self.towers.item.inputs).model_copy(update=plain)
        return self.only((*self.towers.query.inputs, self.item))
