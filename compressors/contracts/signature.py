"""The signature of a model: its inputs, its outputs, and the meaning of the data's columns."""

import operator
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.inputs import (
    AnyInput,
    DataInput,
    IdInput,
    KeyInput,
    SequenceInput,
    TokensInput,
    data_inputs,
    tensor_names,
)
from compressors.contracts.metrics import MetricName, metric, metric_problem
from compressors.contracts.metrics.families import OUTPUT_NAME
from compressors.contracts.metrics.metric import metric_name_of_output
from compressors.contracts.task_kind import OutputForm, TaskKind, TaskName, task_kind
from compressors.contracts.value_errors import value_error

ITEMS = "items"
"""Name of the split that contains the catalogue of a retrieval model, one row per item."""

TRAFFIC = "traffic"
"""Name of the split of logged requests: rows without labels, which a teacher scores."""

MOST_OUTPUTS = 64
"""Largest number of outputs of a model."""

FORWARD = "forward"
"""The method of a network that a call of the network runs."""

METHOD_NAME = r"^[A-Za-z]\w*$"
"""Pattern of the name of a public method or attribute, which has no leading underscore."""

Attributes = dict[Annotated[str, Field(pattern=METHOD_NAME)], bool | int | float | str | None]
"""Attributes of a module by name, and the values that they have while it is called."""


class Tower(Frozen):
    """One of the two towers of a retrieval model: a submodule or a method, and its inputs.

    The query tower encodes the user or query, the item tower an item of the catalogue.

    A tower is called with its inputs in the way that ``Signature.call`` names, and returns vectors
    ``(rows, dim)``. Both towers have the same ``dim``. If both are one module
    (``Signature.shares_tower``), the item tower is called with the names of the query tower's
    inputs.

    Attributes:
        module: attribute path of the submodule; empty if the tower is a method of the network.
        method: the method that returns the vectors.
        attributes: attributes that the submodule, or the network, has during the call of this
            tower, such as ``mode``; other calls do not see these values.
        inputs: names of the inputs.
    """

    module: str = Field(
        "",
        pattern=r"^([A-Za-z_]\w*(\.\w+)*)?$",
        description="Its attribute path.",
        exclude_if=operator.not_,
    )
    method: str = Field(FORWARD, pattern=METHOD_NAME, exclude_if=lambda method: method == FORWARD)
    attributes: Attributes = Field(default_factory=dict, exclude_if=operator.not_)
    inputs: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _require_a_part_of_the_network(self) -> Self:
        if not self.module and self.method == FORWARD:
            raise value_error("tower_is_network")
        return self

    @property
    def path(self) -> str:
        """The attribute path of the submodule or method, for messages."""
        names = [self.module, "" if self.method == FORWARD else self.method]
        return ".".join(filter(None, names))


class Towers(Frozen):
    """Both towers of a retrieval model.

    The score of a query and an item is the dot product of their vectors.
    """

    query: Tower
    item: Tower

    def named(self) -> dict[str, Tower]:
        """Return both towers by name. Each tower is served as a graph of this name."""
        return {"query": self.query, "item": self.item}


class Output(Frozen):
    """One output of a model.

    Attributes:
        name: the output's name.
        kind: name of its task kind.
        form: what its values are: logits or probabilities of label 1, or scores (higher is better).
        label: column with the labels; None if there is none.
        label_where: column of 0 and 1. If it is given, only the labels of rows with 1 are used, and
            other rows may lack one: an output that predicts a purchase after a click has labels
            only for clicked rows. Every row is scored.
        metric: the metric by which the output is judged.
        loss_weight: factor of this output's loss in the sum of the losses of several outputs.
    """

    name: str = Field(pattern=f"^{OUTPUT_NAME}$")
    kind: TaskName
    form: OutputForm
    label: str | None = None
    # Fields with their default are left out, so that hashes of earlier bundles do not change.
    label_where: str | None = Field(None, exclude_if=operator.not_)
    metric: MetricName
    loss_weight: float = Field(1.0, gt=0, le=1e6, exclude_if=lambda weight: weight == 1)

    @model_validator(mode="after")
    def _require_form_and_label(self) -> Self:
        kind = self.task_kind
        if self.form not in kind.forms:
            raise value_error("output_form", task=self.kind, forms=kind.forms, got=self.form)
        if kind.needs_label and self.label is None:
            raise value_error("label_missing", task=self.kind)
        if self.label_where is not None and (self.label is None or not kind.needs_label):
            raise value_error("label_condition_unused", output=self.name, task=self.kind)
        if metric(self.metric).output is not None:
            raise value_error("metric_of_an_output", output=self.name, metric=self.metric)
        return self

    @property
    def task_kind(self) -> TaskKind:
        """The properties of the task kind."""
        return task_kind(self.kind)


def _describe_form(item: AnyInput) -> dict[str, object]:
    """Return what a graph depends on: the fields of an input without its names.

    The name of an optional tensor is replaced by whether the input has this tensor. The maximum
    length of a sequence is left out, and so is the tokenizer: texts are tokenized before the graph.
    """
    fields = item.model_dump(exclude={"name", "columns", "tokenizer"})
    if isinstance(item, SequenceInput):
        names = ("mask", "lengths", "positions", "token_types", "same_length_as")
        fields |= {name: fields.get(name) is not None for name in names} | {"shape": None}
    return fields


def judged_metrics(outputs: tuple[Output, ...]) -> tuple[str, ...]:
    """Return the name of the metric by which each output is judged.

    It is the metric's name, such as ``auc``; with several outputs, ``auc[click]``.
    """
    if len(outputs) == 1:
        return (outputs[0].metric,)
    return tuple(metric_name_of_output(output.metric, output.name) for output in outputs)


class Signature(Frozen):
    """The signature of a model.

    A model with one output returns it, ``(rows,)`` or ``(rows, 1)``; ``core/scores.py`` says what a
    model with several outputs may return.

    Attributes:
        inputs: the model's inputs.
        outputs: the model's outputs, in the order in which the model returns them.
        group: column that groups rows, such as by user or by query.
        time: column with the time of a row.
        towers: the two towers of a ``retrieval`` model; None for other models.
        item: the input with the item's id of a ``retrieval`` model: an input of the item tower, or
            a key (an id that the model does not receive); None for other models. Rows of such a
            model are interactions of the users in column ``group``. If it has no ``label``, all
            interactions are positive.
        call: how ``method`` receives the input tensors: as ``keywords`` (by name), at
            ``positions`` (in the order of the inputs), or in one ``mapping`` from names to tensors.
        method: name of the network's method that returns the outputs.
        scored_by: what gives the score of a row of a ``retrieval`` model: the network's ``method``,
            or, if it has no method that returns the score, the dot product of the vectors of its
            ``towers``.
        attributes: attributes that the network has while it is called.
        repeat_single_row: the network's code fails for a batch of one row, so torch receives such a
            row twice. Graphs do not need this.
    """

    inputs: tuple[AnyInput, ...] = Field(min_length=1)
    outputs: tuple[Output, ...] = Field(json_schema_extra={"minItems": 1, "maxItems": MOST_OUTPUTS})
    group: str | None = None
    time: str | None = None
    towers: Towers | None = None
    item: str | None = None
    # The default is left out, so that hashes of earlier bundles do not change.
    call: Literal["keywords", "positions", "mapping"] = Field(
        "keywords", exclude_if=lambda call: call == "keywords"
    )
    method: str = Field(FORWARD, pattern=METHOD_NAME, exclude_if=lambda method: method == FORWARD)
    scored_by: Literal["method", "towers"] = Field(
        "method", exclude_if=lambda scored_by: scored_by == "method"
    )
    attributes: Attributes = Field(default_factory=dict, exclude_if=operator.not_)
    repeat_single_row: bool = Field(False, exclude_if=lambda repeats: not repeats)

    @model_validator(mode="after")
    def _require_unique_names(self) -> Self:
        names = [name for item in self.data_inputs for name in tensor_names(item)]
        names += [item.name for item in self.inputs if item not in self.data_inputs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise value_error("inputs_repeated", names=tuple(repeated))
        if not 1 <= len(self.outputs) <= MOST_OUTPUTS:
            raise value_error("outputs_count", count=len(self.outputs), most=MOST_OUTPUTS)
        if len(self.outputs) == 1:  # its name is not used in the graph
            if self.outputs[0].loss_weight != 1:
                raise value_error("loss_weight_unused", output=self.outputs[0].name)
            return self
        outputs = [output.name for output in self.outputs]
        inputs = {*names, *(name for item in self.model_inputs for name in tensor_names(item))}
        repeated = sorted({name for name in outputs if outputs.count(name) > 1 or name in inputs})
        if repeated:
            raise value_error("outputs_repeated", names=tuple(repeated))
        return self

    @model_validator(mode="after")
    def _require_outputs_of_rows(self) -> Self:
        if len(self.outputs) > 1 and not self.scores_rows:
            kind = next(item.kind for item in self.outputs if not item.task_kind.scores_rows)
            raise value_error("outputs_of_ranked_catalogue", task=kind)
        return self

    @model_validator(mode="after")
    def _require_sequences_of_equal_length(self) -> Self:
        sequences = {
            item.name: item
            for item in self.inputs
            if isinstance(item, SequenceInput) and not isinstance(item, TokensInput)
        }
        for item in sequences.values():
            if item.same_length_as is None:
                continue
            other = sequences.get(item.same_length_as)
            if other is None or other is item or other.same_length_as is not None:
                raise value_error(
                    "sequence_not_there",
                    name=item.name,
                    other=item.same_length_as,
                    known=tuple(
                        entry.name
                        for entry in sequences.values()
                        if entry is not item and entry.same_length_as is None
                    ),
                )
            if (item.shape, item.min_length, item.padding) != (
                other.shape,
                other.min_length,
                other.padding,
            ):
                raise value_error("sequences_differ", name=item.name, other=other.name)
        return self

    @model_validator(mode="after")
    def _require_measured_metrics(self, info: ValidationInfo) -> Self:
        """Raise if a metric is not measured for the task kind.

        Stored bundles of earlier versions, which did not have this rule, are not checked.
        """
        if isinstance(info.context, dict) and info.context.get("stored"):
            return self
        for output in self.outputs:
            problem = metric_problem(output.kind, output.metric, grouped=self.group is not None)
            if problem is not None:
                raise value_error("metric_not_measured", reason=problem)
        return self

    @model_validator(mode="after")
    def _require_complete_towers(self) -> Self:
        task = self.outputs[0].kind
        if self.scores_rows:
            if self.towers is not None or self.item is not None:
                raise value_error("towers_unexpected", task=task)
            if keys := [entry.name for entry in self.inputs if isinstance(entry, KeyInput)]:
                raise value_error("keys_unexpected", keys=tuple(keys), task=task)
            if self.scored_by == "towers":
                raise value_error("towers_not_there", task=task)
            return self
        if self.towers is None or self.item is None:
            raise value_error("towers_missing", task=task)
        tower_inputs = (*self.towers.query.inputs, *self.towers.item.inputs)
        model_inputs = [entry.name for entry in self.model_inputs]
        if sorted(tower_inputs) != sorted(model_inputs):
            raise value_error(
                "tower_inputs_differ",
                inputs=tuple(sorted(model_inputs)),
                read=tuple(sorted(tower_inputs)),
            )
        keys = [entry.name for entry in self.inputs if isinstance(entry, KeyInput)]
        if self.item not in (*self.towers.item.inputs, *keys):
            raise value_error("item_not_in_tower", item=self.item)
        if keys not in ([], [self.item]):
            raise value_error("keys_unused", keys=tuple(keys), item=self.item)
        item = next(entry for entry in self.inputs if entry.name == self.item)
        if not isinstance(item, IdInput | KeyInput) or item.shape:
            raise value_error("item_no_single_id", item=self.item)
        return self

    @property
    def data_inputs(self) -> tuple[DataInput, ...]:
        """The inputs that read the data; a matrix (several inputs in one tensor) as its fields."""
        return tuple(part for item in self.inputs for part in data_inputs(item))

    @property
    def model_inputs(self) -> tuple[AnyInput, ...]:
        """The inputs that the model receives: all except keys."""
        return tuple(item for item in self.inputs if not isinstance(item, KeyInput))

    @property
    def single_output(self) -> Output:
        """The only output.

        Raises:
            ValueError: there are several outputs, and the caller supports only one.
        """
        (output,) = self.outputs
        return output

    @property
    def has_several_outputs(self) -> bool:
        """Whether scores and labels have a column for each output, and metrics its name."""
        return len(self.outputs) > 1

    @property
    def judged_metrics(self) -> tuple[str, ...]:
        """The name of the metric by which each output is judged, such as ``auc[click]``."""
        return judged_metrics(self.outputs)

    @property
    def judged_by(self) -> str:
        """The number by which steps compare networks, as text in messages, such as ``auc``."""
        names = self.judged_metrics
        return f"the mean of {', '.join(names)}" if len(names) > 1 else names[0]

    @property
    def scores_rows(self) -> bool:
        """Whether the model has one score for each row, so that rows have a loss and a metric."""
        return all(output.task_kind.scores_rows for output in self.outputs)

    @property
    def has_lists(self) -> bool:
        """Whether a loss compares the rows of a group ("list"), so batches contain whole groups."""
        return any(output.task_kind.has_lists for output in self.outputs)

    def remove_labels(self) -> Self:
        """Return the signature without label columns, for rows that have no labels."""
        changes = {"label": None, "label_where": None}
        outputs = tuple(output.model_copy(update=changes) for output in self.outputs)
        return self.model_copy(update={"outputs": outputs})

    def only(self, names: Iterable[str]) -> Self:
        """Return the signature with only the inputs of these names, in unchanged order."""
        selected = set(names)
        return self.model_copy(
            update={"inputs": tuple(item for item in self.inputs if item.name in selected)}
        )

    def of_tower(self, name: str) -> Self:
        """Return the signature of the tower ``query`` or ``item``: its inputs, and its method."""
        if self.towers is None:
            raise ValueError("expected a signature with towers")
        tower = self.towers.named()[name]
        return self.only(tower.inputs).model_copy(
            update={
                "method": tower.method,
                "attributes": tower.attributes,
                "scored_by": "method",
            }
        )

    @property
    def shares_tower(self) -> bool:
        """Whether both towers of a retrieval model are one module with inputs of the same form.

        Then one graph is served for both. Lists may have different lengths.
        """
        if self.towers is None:
            return False
        (first, second) = self.towers.named().values()
        if (first.path, first.attributes) != (second.path, second.attributes):
            return False
        query, item = (
            [_describe_form(item) for item in self.of_tower(name).inputs]
            for name in self.towers.named()
        )
        return query == item

    def of_split(self, split: str) -> Self:
        """Return the signature of the files of one split.

        Files of most models contain all inputs. For ``retrieval``, split ``items`` contains the
        inputs of the item tower, one row per item; other splits contain the inputs of the query
        tower and the item's id. Split ``traffic`` has no labels.
        """
        rows = self.remove_labels() if split == TRAFFIC else self
        if rows.towers is None or rows.item is None:
            return rows
        if split == ITEMS:
            items = rows.remove_labels().only((*rows.towers.item.inputs, rows.item))
            return items.model_copy(update={"group": None, "time": None})
        return rows.only((*rows.towers.query.inputs, rows.item))
