"""The signature of a model: inputs, output, task, label and metric. Types only."""

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from compressors.contracts.inputs import AnyInput, Frozen, IdInput, tensor_names
from compressors.contracts.metric_properties import Metric, Task, metric_problem
from compressors.contracts.value_errors import value_error

ITEMS = "items"
"""The split of a retrieval model that lists what can be found: its catalogue, a row an item."""

TRAFFIC = "traffic"
"""The split of logged requests: rows without a label, which a teacher answers."""


class Tower(Frozen):
    """One half of a retrieval model: a submodule, and the inputs it is called with by name.

    It returns vectors ``(rows, dim)``, of the same ``dim`` as the other tower's.
    """

    module: str = Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*$", description="Its attribute path.")
    inputs: tuple[str, ...] = Field(min_length=1)


class Towers(Frozen):
    """What is served of a retrieval model: a pair's score is the dot product of both vectors."""

    query: Tower
    item: Tower

    def named(self) -> dict[str, Tower]:
        """Both, by the name of the graph each of them becomes."""
        return {"query": self.query, "item": self.item}


class Signature(Frozen):
    """What a model takes in, what it gives out, and what its data is judged by.

    A model is called with its inputs by name and returns ``(rows,)`` or ``(rows, 1)``: a logit
    or a probability for ``ctr``, any score (higher ranks first) for ``ranking`` and
    ``retrieval``.

    ``retrieval`` alone has ``towers``, and ``item``: the input that is the item's id. Its rows
    are interactions of the users in column ``group``; all of them count if there is no ``label``.
    """

    task: Task
    inputs: tuple[AnyInput, ...] = Field(min_length=1)
    output: Literal["logit", "probability", "score"]
    label: str | None = None
    group: str | None = None
    time: str | None = None
    metric: Metric
    towers: Towers | None = None
    item: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [name for item in self.inputs for name in tensor_names(item)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise value_error("inputs_repeated", names=tuple(repeated))
        if self.task == "ctr" and self.output == "score":
            raise value_error("ctr_output_form")
        if self.task != "retrieval" and self.label is None:
            raise value_error("label_missing", task=self.task)
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self, info: ValidationInfo) -> Self:
        """Refuse a metric that the task does not measure, except in bundles stored before."""
        stored = isinstance(info.context, dict) and info.context.get("stored")
        problem = metric_problem(self.task, self.metric, grouped=self.group is not None)
        if problem is not None and not stored:
            raise value_error("metric_not_measured", reason=problem)
        return self

    @model_validator(mode="after")
    def _towers_fit(self) -> Self:
        if self.task != "retrieval":
            if self.towers is not None or self.item is not None:
                raise value_error("towers_unexpected", task=self.task)
            return self
        if self.towers is None or self.item is None:
            raise value_error("towers_missing")
        if self.output != "score":
            raise value_error("retrieval_output_form")
        read = (*self.towers.query.inputs, *self.towers.item.inputs)
        known = {item.name: item for item in self.inputs}
        if sorted(read) != sorted(known):
            raise value_error(
                "tower_inputs_differ", inputs=tuple(sorted(known)), read=tuple(sorted(read))
            )
        if self.item not in self.towers.item.inputs:
            raise value_error("item_not_in_tower", item=self.item)
        found = known[self.item]
        if not isinstance(found, IdInput) or found.shape:
            raise value_error("item_no_single_id", item=self.item)
        return self

    def only(self, names: Iterable[str]) -> Self:
        """The same signature with some of its inputs, in its own order."""
        kept = set(names)
        return self.model_copy(
            update={"inputs": tuple(item for item in self.inputs if item.name in kept)}
        )

    def of_split(self, split: str) -> Self:
        """What the files of one split hold.

        That is everything, except for ``retrieval``: there ``items`` holds what the item tower
        reads, a row an item, and the other splits what the query tower reads and the item's id.
        No label is read from ``traffic``.
        """
        if split == TRAFFIC and self.label is not None:
            return self.model_copy(update={"label": None}).of_split(split)
        if self.towers is None or self.item is None:
            return self
        if split == ITEMS:
            plain = {"label": None, "group": None, "time": None}
            return self.only(self.towers.item.inputs).model_copy(update=plain)
        return self.only((*self.towers.query.inputs, self.item))
