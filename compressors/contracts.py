"""The words that cross layers: types only, no maths, no I/O.

``infra`` may import this module and nothing else of ``compressors``. It imports neither torch
nor any adapter, so a command line can read an order without loading a tensor library.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, model_validator

from compressors.coded_error import CodedError as CodedError
from compressors.inputs import AnyInput as AnyInput
from compressors.inputs import DenseInput as DenseInput
from compressors.inputs import Frozen as Frozen
from compressors.inputs import IdInput as IdInput
from compressors.inputs import JaggedBag as JaggedBag
from compressors.inputs import PaddedBag as PaddedBag
from compressors.inputs import tensor_names as tensor_names
from compressors.limits import Limit as Limit
from compressors.limits import limit_problems as limit_problems
from compressors.limits import limit_warnings as limit_warnings
from compressors.measures import LATENCY_BATCHES as LATENCY_BATCHES
from compressors.measures import MEASURES as MEASURES
from compressors.measures import SCORE_CHANGE as SCORE_CHANGE
from compressors.measures import Measure as Measure
from compressors.measures import Metric as Metric
from compressors.measures import ScoreUnit as ScoreUnit
from compressors.measures import Task as Task
from compressors.measures import measured_metrics as measured_metrics
from compressors.measures import metric_problem as metric_problem
from compressors.measures import quality_metrics as quality_metrics

_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc"
    r"|bad allocation|failed to allocate|unable to allocate|unable to mmap|cannot map"
    r"|malloc of size|can't start new thread"
    r"|failed to map segment from shared object(?!: operation not permitted)",
    re.IGNORECASE,
)
_NATIVE = (RuntimeError, OSError, ImportError, SystemError)
_NATIVE_MODULES = ("onnxruntime", "torch", "safetensors", "safetensors_rust", "pyarrow", "numba")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TargetKind = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
Outcome = Literal["accepted", "rejected", "undecided", "built-unmeasured"]


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: sorted keys, no spaces, models as their fields."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        raise TypeError(f"{type(item).__name__} has no canonical JSON form")

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that there is too little memory.

    numpy and pyarrow raise subclasses of ``MemoryError``; torch, ONNX Runtime, safetensors and
    the system's loader say it in the text of their own classes only.
    """
    seen: set[int] = set()
    error: BaseException | None = fault
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        module = type(error).__module__.partition(".")[0]
        is_native = isinstance(error, _NATIVE) or module in _NATIVE_MODULES
        if is_native and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


_ARTIFACT_URI = re.compile(r"(?:.*/)?artifacts/([0-9a-f]{64})/?", re.DOTALL)


def artifact_name(uri: str) -> str | None:
    """The SHA-256 in an artifact's URI, ``[<root>/]artifacts/<sha256>``; None for another text."""
    found = _ARTIFACT_URI.fullmatch(uri)
    return None if found is None else found[1]


def _without_root(uri: str) -> str:
    name = artifact_name(uri)
    return uri if name is None else f"artifacts/{name}"


class Artifact(Frozen):
    """Something stored, named by its content; the only value that tasks exchange.

    ``uri`` is relative to the root of the store, so that a store can be moved or mounted
    elsewhere. URIs of earlier versions, which begin with a root, lose it when they are read: the
    content is found, and verified, by its hash. ``sha256`` is the root over the manifest's chunk
    hashes, ``bytes`` the size of all files.
    """

    uri: Annotated[str, AfterValidator(_without_root)]
    sha256: Sha256
    bytes: int = Field(ge=0)


# --- what a model takes in -------------------------------------------------------------------

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


class Schema(Frozen):
    """What a model takes in, what it gives out, and what its data is judged by.

    A model is called with its inputs by name and returns ``(rows,)`` or ``(rows, 1)``: a logit
    or a probability for ``ctr``, any score (higher ranks first) for ``ranking`` and
    ``retrieval``.

    ``retrieval`` alone has ``towers``, and ``item``: the input that is the item's id. Its rows
    are interactions of whoever ``group`` says; all of them count where there is no ``label``.
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
            raise ValueError(f"inputs share the name(s) {', '.join(repeated)}")
        if self.task == "ctr" and self.output == "score":
            raise ValueError("task 'ctr' needs output 'logit' or 'probability'")
        if self.task != "retrieval" and self.label is None:
            raise ValueError(f"label is missing; task {self.task!r} needs a label column")
        return self

    @model_validator(mode="after")
    def _metric_is_measured(self, info: ValidationInfo) -> Self:
        """Refuse a metric that the task does not measure, except in bundles stored before."""
        stored = isinstance(info.context, dict) and info.context.get("stored")
        problem = metric_problem(self.task, self.metric, grouped=self.group is not None)
        if problem is not None and not stored:
            raise ValueError(problem)
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


# --- what a model is -------------------------------------------------------------------------


class Architecture(Frozen):
    """Where the network's class lies and what it is built with."""

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class")
    config: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments.")


class ModuleRecord(Frozen):
    """What stands where the architecture built an Embedding, EmbeddingBag, Linear or norm.

    One of kind ``output`` stands where it built nothing, behind its output.
    """

    kind: Literal["table", "bag", "linear", "norm", "output"]
    format: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Network(Frozen):
    """All that is needed, beside the tensors, to build a module."""

    architecture: Architecture
    modules: dict[str, ModuleRecord] = Field(default_factory=dict)
    ties: dict[str, str] = Field(
        default_factory=dict, description="Tensor name -> the stored tensor it shares."
    )


DROPPED = "dropped"
"""The format of a table or layer that is gone."""


class PlanLine(Frozen):
    """What a recipe decided for one table or dense layer, and why."""

    module: str
    role: Literal["table", "dense", "other"]
    format: str
    bytes_before: int = Field(ge=0)
    bytes_after: int = Field(ge=0)
    steps: tuple[str, ...] = Field((), description="The steps that changed it, in order.")
    reason: str
    warning: str | None = Field(None, description="What may be wrong with the result, and why.")


class Plan(Frozen):
    """One explicit line for every table and every dense layer.

    ``remarks`` are sentences about a step that no line shows: a step that changed nothing, a unit
    that a step had to skip.
    """

    lines: tuple[PlanLine, ...] = ()
    remarks: tuple[str, ...] = ()

    def of(self, module: str) -> PlanLine | None:
        """The line of one module, or None."""
        return next((line for line in self.lines if line.module == module), None)


# --- what a step may look at -----------------------------------------------------------------


class Split(Frozen):
    """One part of the data as tensors on this machine's disk, named by its content."""

    path: str
    sha256: Sha256
    rows: int = Field(ge=1)


Part = Literal[
    "train", "calibration", "validation", "soft_labels", "traffic", "traffic_soft_labels"
]
Change = Literal["format", "values", "parts", "output"]


class Bench(Frozen):
    """What a step may learn from. It never holds test data.

    ``soft_labels`` holds what the teacher answers to every row of ``train``, in its order:
    ``score`` float32 ``(rows,)`` in the form of the schema's output; ``traffic_soft_labels`` the
    same for ``traffic``, whose labels mean nothing. With ``teachers`` beside ``teacher`` it is the
    mean of what all of them answer.
    """

    signature: Schema
    train: Split | None = None
    calibration: Split | None = None
    validation: Split | None = None
    teacher: Artifact | None = None
    teachers: tuple[Artifact, ...] = ()
    soft_labels: Split | None = None
    traffic: Split | None = None
    traffic_soft_labels: Split | None = None
    checkpoints: str | None = Field(
        None, description="A folder of this machine where a long step keeps its progress."
    )
    seed: int = 0
    device: str = "cpu"
    seconds: float | None = Field(None, gt=0, description="Time budget of one step.")


# --- what is promised and what was measured --------------------------------------------------


class Estimate(Frozen):
    """A number with its 95 % interval; exact numbers have ``low == point == high``."""

    point: float
    low: float
    high: float
    rows: int | None = Field(None, description="How many rows it was estimated from.")
    groups: int | None = Field(
        None, description="How many groups, such as users, it was estimated from, if rows have one."
    )
    unresolved: str | None = Field(
        None, description="Why there is no interval; then it is the whole range of the metric."
    )


class Judgement(Frozen):
    """What measuring said about one limit."""

    limit: Limit
    measured: Estimate | None
    outcome: Literal["accepted", "rejected", "undecided"]
    rows_to_decide: int | None = None
    groups_to_decide: int | None = None
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
