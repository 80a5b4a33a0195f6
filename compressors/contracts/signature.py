"""The signature of a model: its inputs and its outputs. Types only."""

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


class Output(Frozen):
    """One output of a model: the kind of task, the form of the values, the label and the metric.

    The values of a row are a logit or a probability for ``ctr``, any score (higher ranks first)
    for ``ranking`` and ``retrieval``.
    """

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")
    kind: TaskName
    form: OutputForm
    label: str | None = None
    metric: MetricName

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        kind = self.task_kind
        if self.form not in kind.forms:
            raise value_error("output_form", task=self.kind, forms=kind.forms, got=self.form)
        if kind.needs_label and self.label is None:
            raise value_error("label_missing", task=self.kind)
        return self

    @property
    def task_kind(self) -> TaskKind:
        """What the kind of task declares."""
        return task_kind(self.kind)


class Signature(Frozen):
    """Inputs and outputs of a model, and the columns of its data that no output has alone.

    A model is called with its inputs by name and returns its only output, ``(rows,)`` or
    ``(rows, 1)``. Code that iterates over ``outputs`` is written for several; code that is not
    takes ``single_output``.

    ``retrieval`` alone has ``towers``, and ``item``: the input that is the item's id. Its rows
    are interactions of the users in column ``group``; without ``label`` all of them are positive.
    """

    inputs: tuple[AnyInput, ...] = Field(min_length=1)
    outputs: tuple[Output, ...] = Field(json_schema_extra={"minItems": 1, "maxItems": 1})
    group: str | None = None
    time: str | None = None
    towers: Towers | None = None
    item: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [name for item in self.inputs for name in tensor_names(item)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise value_error("inputs_repeated", names=tuple(repeated))
        if len(self.outputs) != 1:
            raise value_error("outputs_count", count=len(self.outputs))
        return self

    @model_validator(mode="after")
    def _metrics_are_measured(self, info: ValidationInfo) -> Self:
        """Refuse a metric that is not measured for the task, except in stored bundles."""
        if isinstance(info.context, dict) and info.context.get("stored"):
            return self
        for output in self.outputs:
            problem = metric_problem(output.kind, output.metric, grouped=self.group is not None)
            if problem is not None:
                raise value_error("metric_not_measured", reason=problem)
        return self

    @model_validator(mode="after")
    def _towers_fit(self) -> Self:
        task = self.single_output.kind
        if self.scores_rows:
            if self.towers is not None or self.item is not None:
                raise value_error("towers_unexpected", task=task)
            return self
        if self.towers is None or self.item is None:
            raise value_error("towers_missing", task=task)
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
    def single_output(self) -> Output:
        """The only output.

        Raises:
            ValueError: there are several, so the caller would ignore all but one.
        """
        (output,) = self.outputs
        return output

    @property
    def scores_rows(self) -> bool:
        """Whether the model has scores for each row, so that rows have a loss and a metric."""
        return all(output.task_kind.scores_rows for output in self.outputs)

    @property
    def has_lists(self) -> bool:
        """Whether the loss of an output is computed by list, so batches contain whole groups."""
        return any(output.task_kind.has_lists for output in self.outputs)

    def without_labels(self) -> Self:
        """Return the signature of rows that have no labels."""
        outputs = tuple(output.model_copy(update={"label": None}) for output in self.outputs)
        return self.model_copy(update={"outputs": outputs})

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
        tower and the item's id. ``traffic`` has no labels.
        """
        rows = self.without_labels() if split == TRAFFIC else self
        if rows.towers is None or rows.item is None:
            return rows
        if split == ITEMS:
            items = rows.without_labels().only(rows.towers.item.inputs)
            return items.model_copy(update={"group": None, "time": None})
        return rows.only((*rows.towers.query.inputs, rows.item))
