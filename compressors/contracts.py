"""The words that cross layers: types only, no maths, no I/O.

``infra`` may import this module and nothing else of ``compressors``. It imports neither torch
nor any adapter, so a command line can read an order without loading a tensor library.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TargetKind = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
OutOfRange = Literal["error", "clamp", "default_row"]
Outcome = Literal["accepted", "rejected", "undecided", "built-unmeasured"]


class Frozen(BaseModel):
    """A value: equal when its fields are equal, and never changed after it was made."""

    # Not-a-number must not read back as "nothing given".
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: sorted keys, no spaces, models as their fields."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"{type(item).__name__} has no canonical JSON form")

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


class Artifact(Frozen):
    """Something stored, named by what it contains; the only thing tasks hand each other.

    ``sha256`` is the root over the manifest's chunk hashes, ``bytes`` the size of all files.
    """

    uri: str
    sha256: Sha256
    bytes: int = Field(ge=0)


# --- what a model takes in -------------------------------------------------------------------


class IdInput(Frozen):
    """One id per row, or several ids of one table: int, shape ``()`` or ``(fields,)``."""

    kind: Literal["id"] = "id"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["int64", "int32"] = "int64"
    shape: tuple[int, ...] = ()
    table: str
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        wanted = () if len(self.columns) == 1 else (len(self.columns),)
        if self.shape != wanted:
            raise ValueError(
                f"input {self.name!r} reads {len(self.columns)} column(s), so its shape is "
                f"{list(wanted)}; found {list(self.shape)}"
            )
        return self


class DenseInput(Frozen):
    """A dense vector per row: float32, shape ``(width,)``.

    ``columns`` is either ``width`` scalar columns or one column of lists of that length.
    """

    kind: Literal["dense"] = "dense"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["float32"] = "float32"
    shape: tuple[int, ...]

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        if len(self.shape) != 1 or self.shape[0] < 1:
            raise ValueError(f"dense input {self.name!r} needs shape [width]")
        if len(self.columns) not in (1, self.shape[0]):
            raise ValueError(
                f"dense input {self.name!r} of width {self.shape[0]} needs 1 list column or "
                f"{self.shape[0]} scalar columns; found {len(self.columns)}"
            )
        return self


class PaddedBag(Frozen):
    """A list of ids per row, padded at the end with ``padding_id``: int, shape ``(length,)``."""

    kind: Literal["padded_bag"] = "padded_bag"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["int64", "int32"] = "int64"
    shape: tuple[int, ...]
    table: str
    padding_id: int = Field(0, ge=0)
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        _check_bag(self)
        return self


class JaggedBag(Frozen):
    """A list of ids per row, all lists end to end.

    The model is called with ``name`` (values, int ``(all ids,)``) and ``name_offsets``
    (where each row begins, int ``(rows,)``) or ``name_lengths`` (ids per row, int ``(rows,)``).
    ``shape`` is ``(longest,)``: the longest list a request may carry, because a served graph
    pads inside itself. A longer list scores NaN, never a silently shortened answer.
    """

    kind: Literal["jagged_bag"] = "jagged_bag"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["int64", "int32"] = "int64"
    shape: tuple[int, ...]
    table: str
    layout: Literal["offsets", "lengths"] = "offsets"
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _shape_fits(self) -> Self:
        _check_bag(self)
        return self


def _with_columns(data: Any) -> Any:
    if isinstance(data, dict) and not data.get("columns") and isinstance(data.get("name"), str):
        return {**data, "columns": (data["name"],)}
    return data


def _check_bag(bag: PaddedBag | JaggedBag) -> None:
    if len(bag.shape) != 1 or bag.shape[0] < 1:
        raise ValueError(f"bag {bag.name!r} needs shape [length], at least 1")
    if len(bag.columns) != 1:
        raise ValueError(f"bag {bag.name!r} reads exactly one list column")


ITEMS = "items"
"""The split of a retrieval model that lists what can be found: its catalogue, a row an item."""

AnyInput = Annotated[IdInput | DenseInput | PaddedBag | JaggedBag, Field(discriminator="kind")]
Metric = Literal["auc", "gauc", "ndcg@10", "recall@20", "ndcg@20"]
Measure = Literal[
    "auc",
    "gauc",
    "ndcg@10",
    "recall@20",
    "ndcg@20",
    "logloss",
    "normalized_entropy",
    "bytes",
    "p50_ms@1",
    "p99_ms@1",
    "p50_ms@64",
    "p99_ms@64",
    "p50_ms@1024",
    "p99_ms@1024",
]


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


class Schema(Frozen):
    """What a model takes in, what it gives out, and what its data is judged by.

    A model is called with its inputs by name and returns ``(rows,)`` or ``(rows, 1)``: a logit
    or a probability for ``ctr``, any score (higher ranks first) for ``ranking`` and
    ``retrieval``.

    ``retrieval`` alone has ``towers``, and ``item``: the input that is the item's id. Its rows
    are interactions of whoever ``group`` says; all of them count where there is no ``label``.
    """

    task: Literal["ctr", "ranking", "retrieval"]
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
            raise ValueError(f"inputs share the name(s) {', '.join(repeated)}")
        if self.metric != "auc" and self.group is None:
            raise ValueError(f"metric {self.metric!r} needs a group column")
        if self.task == "ctr" and self.output == "score":
            raise ValueError("task 'ctr' needs output 'logit' or 'probability'")
        if self.task != "retrieval" and self.label is None:
            raise ValueError(f"label is missing; task {self.task!r} needs a label column")
        retrieves = self.metric in ("recall@20", "ndcg@20")
        if retrieves != (self.task == "retrieval"):
            own = "recall@20 or ndcg@20" if self.task == "retrieval" else "auc, gauc or ndcg@10"
            raise ValueError(f"task {self.task!r} needs metric {own}; found {self.metric!r}")
        return self

    @model_validator(mode="after")
    def _towers_fit(self) -> Self:
        if self.task != "retrieval":
            if self.towers is not None or self.item is not None:
                raise ValueError(f"towers and item belong to task 'retrieval', not {self.task!r}")
            return self
        if self.towers is None or self.item is None:
            raise ValueError("task 'retrieval' needs towers (query and item) and item, the id")
        if self.output != "score":
            raise ValueError("task 'retrieval' needs output 'score', the dot product of vectors")
        read = (*self.towers.query.inputs, *self.towers.item.inputs)
        known = {item.name: item for item in self.inputs}
        if sorted(read) != sorted(known):
            raise ValueError(
                f"every input belongs to exactly one tower; inputs are {', '.join(sorted(known))}, "
                f"the towers read {', '.join(sorted(read))}"
            )
        if self.item not in self.towers.item.inputs:
            raise ValueError(f"item {self.item!r} is not among the item tower's inputs")
        found = known[self.item]
        if not isinstance(found, IdInput) or found.shape:
            raise ValueError(f"item {self.item!r} must be an id input of one column")
        return self

    def only(self, names: Iterable[str]) -> Self:
        """The same schema with some of its inputs, in its own order."""
        kept = set(names)
        return self.model_copy(
            update={"inputs": tuple(item for item in self.inputs if item.name in kept)}
        )

    def of_split(self, split: str) -> Self:
        """What the files of one split hold.

        That is everything, except for ``retrieval``: there ``items`` holds what the item tower
        reads, a row an item, and the other splits what the query tower reads and the item's id.
        """
        if self.towers is None or self.item is None:
            return self
        if split == ITEMS:
            plain = {"label": None, "group": None, "time": None}
            return self.only(self.towers.item.inputs).model_copy(update=plain)
        return self.only((*self.towers.query.inputs, self.item))


def tensor_names(item: AnyInput) -> tuple[str, ...]:
    """The arguments of the model's forward that one input becomes."""
    if isinstance(item, JaggedBag):
        return (item.name, f"{item.name}_{item.layout}")
    return (item.name,)


# --- what a model is -------------------------------------------------------------------------


class Architecture(Frozen):
    """Where the network's class lies and what it is built with."""

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class")
    config: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments.")


class ModuleRecord(Frozen):
    """What stands where the architecture built an Embedding, EmbeddingBag or Linear."""

    kind: Literal["table", "bag", "linear"]
    format: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Network(Frozen):
    """All that is needed, beside the tensors, to build a module."""

    architecture: Architecture
    modules: dict[str, ModuleRecord] = Field(default_factory=dict)
    ties: dict[str, str] = Field(
        default_factory=dict, description="Tensor name -> the stored tensor it shares."
    )


class PlanLine(Frozen):
    """What a recipe decided for one table or dense layer, and why."""

    module: str
    role: Literal["table", "dense", "other"]
    format: str
    bytes_before: int = Field(ge=0)
    bytes_after: int = Field(ge=0)
    steps: tuple[str, ...] = Field((), description="The steps that changed it, in order.")
    reason: str


class Plan(Frozen):
    """One explicit line for every table and every dense layer."""

    lines: tuple[PlanLine, ...] = ()

    def of(self, module: str) -> PlanLine | None:
        """The line of one module, or None."""
        return next((line for line in self.lines if line.module == module), None)


# --- what a step may look at -----------------------------------------------------------------


class Split(Frozen):
    """One part of the data as tensors on this machine's disk, named by its content."""

    path: str
    sha256: Sha256
    rows: int = Field(ge=1)


Part = Literal["train", "calibration", "validation", "soft_labels"]
Change = Literal["format", "values"]


class Bench(Frozen):
    """What a step may learn from. It never holds test data.

    ``soft_labels`` holds what the teacher answers to every row of ``train``, in its order:
    ``score`` float32 ``(rows,)`` in the form of the schema's output.
    """

    signature: Schema
    train: Split | None = None
    calibration: Split | None = None
    validation: Split | None = None
    teacher: Artifact | None = None
    soft_labels: Split | None = None
    checkpoints: str | None = Field(
        None, description="A folder of this machine where a long step keeps its progress."
    )
    seed: int = 0
    device: str = "cpu"
    seconds: float | None = Field(None, gt=0, description="Time budget of one step.")


# --- what is promised and what was measured --------------------------------------------------


class Limit(Frozen):
    """One promise about one measured number.

    ``absolute`` compares the number itself. ``baseline`` and ``champion`` compare with that
    model: the difference (candidate minus other) for quality, the ratio (candidate / other) for
    bytes and latency.
    """

    metric: Measure = Field(
        description="Quality, bytes served, or latency: p99_ms@64 is the 99th percentile in "
        "milliseconds at batch 64.",
        json_schema_extra={"position": 0},
    )
    against: Literal["absolute", "baseline", "champion"] = Field(
        "baseline",
        description="Quality: difference to it. Bytes and latency: ratio to it.",
        json_schema_extra={"position": 1},
    )
    at_least: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Give one of at_least and at_most.",
        json_schema_extra={"position": 2},
    )
    at_most: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Give one of at_least and at_most.",
        json_schema_extra={"position": 3},
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"limit on {self.metric!r} needs exactly one of at_least, at_most")
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        bound = self.at_least if self.at_least is not None else self.at_most
        if self.against == "absolute" and bound is not None and bound < 0:
            raise ValueError(
                f"{self.metric} itself is never below 0; to limit a change write "
                f"'{self.metric} vs baseline'"
            )
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a limit as people write it: ``auc vs baseline >= -0.002``, ``bytes <= 500000``.

        Raises:
            ValueError: it is not of that form.
        """
        found = re.fullmatch(
            r"\s*(?P<metric>[\w@]+)(\s+vs\s+(?P<against>baseline|champion))?"
            r"\s*(?P<sign>>=|<=)\s*(?P<value>\S+)\s*",
            text,
        )
        if found is None:
            raise ValueError(
                f"limit {text!r} is not of the form 'auc vs baseline >= -0.002' (vs baseline, vs "
                f"champion or neither; >= or <=)"
            )
        bound = "at_least" if found["sign"] == ">=" else "at_most"
        return cls.model_validate(
            {
                "metric": found["metric"],
                "against": found["against"] or "absolute",
                bound: found["value"],
            }
        )

    def __str__(self) -> str:
        versus = "" if self.against == "absolute" else f" vs {self.against}"
        if self.at_least is not None:
            return f"{self.metric}{versus} >= {self.at_least:g}"
        return f"{self.metric}{versus} <= {self.at_most:g}"


class Estimate(Frozen):
    """A number with its 95 % interval; exact numbers have ``low == point == high``."""

    point: float
    low: float
    high: float
    rows: int | None = Field(None, description="How many rows it was estimated from.")


class Judgement(Frozen):
    """What measuring said about one limit."""

    limit: Limit
    measured: Estimate | None
    outcome: Literal["accepted", "rejected", "undecided"]
    rows_to_decide: int | None = None
    reason: str


class Verdict(Frozen):
    """What the gate said about one target."""

    target: TargetKind
    outcome: Outcome
    judgements: tuple[Judgement, ...] = ()
    reason: str


def overall(verdicts: Iterable[Verdict]) -> Outcome:
    """The order's outcome: the worst of its measured targets (contract 5).

    ``built-unmeasured`` neither blocks nor counts as accepted: an order with nothing measured
    stays ``built-unmeasured``.
    """
    outcomes = {verdict.outcome for verdict in verdicts}
    order: tuple[Outcome, ...] = ("rejected", "undecided", "accepted")
    return next((outcome for outcome in order if outcome in outcomes), "built-unmeasured")
