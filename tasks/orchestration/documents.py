"""JSON documents that tasks store next to their files, and functions to read them. No Prefect.

``Report`` is the result of an order, for people, programs and the registry.
"""

import operator
from pathlib import Path
from typing import Any, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    computed_field,
    model_validator,
)

from compressors.contracts import (
    Artifact,
    Estimate,
    Frozen,
    Limit,
    Outcome,
    Plan,
    Verdict,
)
from compressors.contracts.reasoned import Reasoned
from compressors.contracts.reasons import Reason, read_reasons
from compressors.contracts.targets import engine_suffixes
from compressors.contracts.targets.runtime import Machine
from compressors.errors.compression import CompressionError
from compressors.lower.findings import GraphAudit, Parity, TableInitializers
from compressors.metrics import judge
from infra.bundle.json_limits import validated
from infra.bundle.json_reader import clean, read_document
from infra.errors import RecordRefused
from tasks.orchestration.workspace import local, store

REPORT = "report.json"
MARKDOWN = "report.md"
PAGE = "report.html"
ORDER_FILE = "order.json"
STAGES = "stages.json"
AS_TRAINED = "as trained"


class BatchSizes(Frozen):
    """Expected batch sizes of a target: smallest, the one to optimize for, largest."""

    low: int
    best: int
    high: int


class GraphInput(Frozen):
    """One input a caller must send: ``shape`` without the varying first dimension.

    That dimension is the rows, except for the values of a jagged bag: those are the ids of all rows
    concatenated, at most ``longest`` per row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    longest: int | None = None


class LoweredGraph(Frozen):
    """One graph, with its facts.

    ``width`` is the length of the output vectors, or None if ``output`` is one number per row.
    ``packed_bytes`` is the plan's bytes of the weights of its part of the model, each counted once.
    ``sparse_layers`` are those with two zeros among every four inputs. ``audit`` is None if no step
    has changed the model, or if the runtime does not show its optimized graph.
    """

    name: str
    inputs: tuple[GraphInput, ...]
    output: str
    width: int | None = None
    rows_parity: Parity
    edge_parity: Parity
    audit: GraphAudit | None
    tables: tuple[TableInitializers, ...]
    packed_bytes: int
    sparse_layers: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Its file next to ``lowering.json``; large weights are stored next to it."""
        return f"{self.name}.onnx"


class Lowering(Frozen):
    """The document stored next to the graphs of a model; requests wait for the first graph.

    A model has one graph, ``model``; a retrieval model has two, ``query`` and ``item``.
    ``packed_bytes`` counts each stored tensor of the model once, as plans do;
    ``served_packed_bytes`` counts it in every graph that reads it, as served bytes do;
    ``repeated_bytes`` is the part of the latter that is due to tensors in several graphs.
    """

    target: str
    name: str
    graphs: tuple[LoweredGraph, ...] = Field(min_length=1)
    packed_bytes: int
    repeated_bytes: int = 0

    @property
    def served_packed_bytes(self) -> int:
        """Bytes of weights in all graphs together."""
        return sum(graph.packed_bytes for graph in self.graphs)


class Measurement(Frozen):
    """Measurements of one target: the numbers of the candidate and of the baseline."""

    numbers: judge.Measured
    baseline: judge.Measured
    resolves: dict[str, float]
    rows: int
    machine: Machine


class PreparedRows(Frozen):
    """A prepared split and its number of rows."""

    artifact: Artifact
    rows: int


class Ranking(Frozen):
    """Inputs of a full ranking other than the test rows: the catalogue, and items seen before."""

    items: PreparedRows
    seen: tuple[PreparedRows, ...]


class NotApplicable(Reasoned):
    """A step of a recipe that has nothing to do in this model, and the reason."""


def not_applicable(fault: CompressionError) -> NotApplicable:
    """Build the outcome of a step that refuses a model."""
    return NotApplicable(reasons=(Reason("not_applicable", fault=str(fault)),))


class Scored(Frozen):
    """One stage of a recipe: a model and its predictions for the test rows.

    ``score`` contains one score per row, or for ``retrieval`` the metrics of every query.
    """

    step: str
    bundle: Artifact
    score: Artifact


class Stage(Frozen):
    """One stage of a recipe: bytes of the model's weights and its quality in torch.

    ``change`` is the difference to the stage before; the untouched model has none.
    """

    step: str
    bundle: Artifact
    bytes: int
    quality: Estimate
    change: Estimate | None = None


Stages = TypeAdapter(tuple[Stage, ...])


class TargetReport(Frozen):
    """One target: its served files and their facts."""

    target: str
    required: bool
    artifact: Artifact
    bytes: int
    verdict: Verdict
    lowering: Lowering
    audits: dict[str, dict[str, object]] = Field(
        default_factory=dict, description="Of each engine, by the name of its graph."
    )


class Reproduction(Frozen):
    """How to run an order again: the command, and the contents of ``ORDER_FILE``."""

    command: str
    order: dict[str, Any]


class Report(Frozen):
    """An order and its result; the document a registry version points to."""

    schema_version: int = 1
    order: str = Field(description="Digest of everything the result was made from.")
    recpress_version: str = Field("", description="That carried it out; empty in older reports.")
    name: str
    bundle_version: str
    metric: str
    source: Artifact
    compressed: Artifact
    champion: Artifact | None = Field(
        None, description="The graph it was compared with, if a limit needs that."
    )
    other_champions: dict[str, Artifact] = Field(
        default_factory=dict,
        exclude_if=operator.not_,
        description="What the further measured targets were compared with, by target.",
    )
    recipe: tuple[dict[str, Any], ...]
    limits: tuple[Limit, ...]
    plan: Plan
    outcome: Outcome
    targets: tuple[TargetReport, ...] = Field(min_length=1)
    skipped: dict[str, str] = Field(
        default_factory=dict, description="Optional targets that were left out, and why."
    )
    idle_reasons: dict[str, Reason] = Field(
        default_factory=dict,
        description="Steps that were left out, and why. In JSON 'idle' has the sentences.",
    )
    remark_reasons: tuple[Reason, ...] = Field(
        (),
        description="What else was decided: the quality budget, units that steps skipped, steps "
        "that changed nothing. In JSON 'remarks' are the sentences.",
    )
    stages: tuple[Stage, ...] = Field(
        (), description="What each step was worth, in torch on the test rows; nothing judges by it."
    )
    baseline_bytes: int
    measurement: Measurement | None = Field(description="Of the first measured target.")
    other_measurements: dict[str, Measurement] = Field(
        default_factory=dict,
        exclude_if=operator.not_,
        description="Of the further measured targets, by target.",
    )
    validation: Artifact
    calibrated_on: str
    reproduction: Reproduction

    @property
    def first_measured(self) -> TargetReport | None:
        """The first target whose limits were judged; ``baseline_bytes`` is of its baseline."""
        judged = (item for item in self.targets if item.verdict.outcome != "built-unmeasured")
        return next(judged, None)

    @property
    def measured(self) -> dict[str, Measurement]:
        """The measurements of all measured targets, by target."""
        if self.measurement is None:
            return {}
        first = self.first_measured or self.targets[0]
        return {first.target: self.measurement, **self.other_measurements}

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def idle(self) -> dict[str, str]:
        """Why steps were left out, in sentences."""
        return {step: str(reason) for step, reason in self.idle_reasons.items()}

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def remarks(self) -> tuple[str, ...]:
        """Return the other decisions as sentences."""
        return tuple(map(str, self.remark_reasons))

    @model_validator(mode="wrap")
    @classmethod
    def _read_sentences(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        return read_reasons(
            data,
            lambda rest: read_reasons(rest, validate, "remarks", "remark_reasons"),
            "idle",
            "idle_reasons",
        )


class Finished(Frozen):
    """A published report: its artifact and its registry version."""

    report: Report
    release: Artifact
    version: str
    registry: str

    def fetch_command(self) -> str:
        """Return the command that fetches the result, with the flag that its verdict requires."""
        first = self.report.targets[0]
        flag = {"accepted": "", "built-unmeasured": " --unmeasured"}.get(
            first.verdict.outcome, " --unaccepted"
        )
        return (
            f"recpress registry fetch {self.report.name} --version {self.version} "
            f"--target {first.target} --into ./{self.report.name}{flag}"
        )

    def page_uri(self) -> str:
        """Return the URI of the report's page."""
        return page_uri(self.release)

    def page_command(self) -> str:
        """Return the command that shows the report's page."""
        return f"recpress registry show {self.report.name} --version {self.version} --html ./{PAGE}"


def page_uri(release: Artifact) -> str:
    """Return the full URI of the page of a release's report."""
    return store().file_uri(release, PAGE)


def page_reference(release: Artifact) -> str:
    """Return the reference to the page that is recorded outside the store."""
    if store().folder is None:
        return page_uri(release)
    return f"{store().reference(release)}/files/{PAGE}"


def build_record(graph: str) -> str:
    """Read the file next to an engine that describes its build and its audit."""
    return "build.json" if graph == "model" else f"{graph}.build.json"


def lowering_of(folder: Path) -> Lowering:
    """Read the document stored next to the graphs of a model."""
    return read_document(Lowering, folder / "lowering.json")


def served_bytes(folder: Path) -> int:
    """Return the bytes that a target loads: all graphs with their weights, or all engines.

    The same for the baseline, the candidate and the champion. A tensor that two graphs read is in
    both files and counts in both.
    """
    suffixes = engine_suffixes()
    engines = [path for path in folder.iterdir() if path.suffix in suffixes]
    return sum(path.stat().st_size for path in engines or folder.glob("*.onnx*"))


def measurement_of(artifact: Artifact) -> Measurement:
    """Read a stored measurement."""
    return read_document(Measurement, local(artifact) / "measurement.json")


def report_of(release: Artifact) -> Report:
    """Read a stored report, verified by its hash.

    Raises:
        ArtifactMissing, ArtifactDamaged: it is missing or damaged.
        RecordRefused: it is not a report.
    """
    try:
        return validated(Report, store().file(release, REPORT))
    except ValidationError as fault:
        first = fault.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise RecordRefused(
            "report_unusable",
            release=store().uri_of(release),
            file=REPORT,
            problem=f"{clean(place)}: {clean(first['msg'])}",
        ) from fault
    except ValueError as fault:
        raise RecordRefused(
            "report_unusable",
            release=store().uri_of(release),
            file=REPORT,
            problem=clean(fault),
        ) from fault
