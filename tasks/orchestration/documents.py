"""Types of the JSON documents that tasks store, and functions to read them. No Prefect.

``Measurement`` has the numbers of a target, and ``Report`` the whole result of an order. The
documents about graphs are in ``graph_documents.py``.
"""

import operator
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
from compressors.contracts.targets.runtime import Machine
from compressors.errors.compression import CompressionError
from compressors.metrics.measured import Measured
from infra.bundle.json_limits import validate_json
from infra.bundle.json_reader import escape_message, read_document
from infra.errors import RecordRefused
from tasks.orchestration.graph_documents import Lowering
from tasks.orchestration.workspace import local, store

REPORT = "report.json"
MARKDOWN = "report.md"
PAGE = "report.html"
ORDER_FILE = "order.json"
STAGES = "stages.json"
AS_TRAINED = "as trained"
"""Name of the first stage: the untouched model."""


class Measurement(Frozen):
    """Measurements of one target.

    Attributes:
        numbers: quality, bytes and latency of the compressed model, and its changes from the
            untouched model and the champion.
        baseline: quality, bytes and latency of the untouched model.
        resolves: for each quality metric, half the width of the interval of its change: smaller
            changes cannot be detected with these rows.
        rows: number of test rows.
        machine: the machine and the runtime.
        not_timed: latencies that were not measured because that would have taken too long, with the
            seconds that they would have taken.
    """

    numbers: Measured
    baseline: Measured
    resolves: dict[str, float]
    rows: int
    machine: Machine
    not_timed: dict[str, float] = Field(default_factory=dict, exclude_if=operator.not_)


class PreparedRows(Frozen):
    """A prepared split, whose columns are stored as tensors, and its number of rows."""

    artifact: Artifact
    rows: int


class Ranking(Frozen):
    """Inputs of a full ranking, in addition to the test rows.

    Attributes:
        items: the catalogue: all items that are ranked.
        seen: earlier interactions. A query's items in them are left out of its ranking.
    """

    items: PreparedRows
    seen: tuple[PreparedRows, ...]


class NotApplicable(Reasoned):
    """The result of a step that changes nothing in this model, with the reason."""


def not_applicable(fault: CompressionError) -> NotApplicable:
    """Build the result of a step from the error that it raised."""
    return NotApplicable(reasons=(Reason("not_applicable", fault=str(fault)),))


class ScoredStage(Frozen):
    """A stage (the model after a step of a recipe) and its predictions.

    Attributes:
        step: kind of the step, or ``AS_TRAINED`` for the untouched model.
        bundle: the model.
        score: one score per row, or for ``retrieval`` the metrics of every query.
    """

    step: str
    bundle: Artifact
    score: Artifact


class StageQuality(Frozen):
    """One metric of a stage, on the test rows.

    Attributes:
        quality: the metric.
        change: its change from the previous stage; None for the untouched model.
    """

    quality: Estimate
    change: Estimate | None = None


class Stage(Frozen):
    """A stage (the model after a step of a recipe) and its measurements in torch.

    Attributes:
        step: kind of the step, or ``AS_TRAINED`` for the untouched model.
        bundle: the model.
        bytes: bytes of the model's weights.
        quality: the signature's metric, of the first output, on the test rows.
        change: change of the metric from the previous stage; None for the untouched model.
        other_outputs: the same numbers for the metrics of further outputs, by the metric's name.
    """

    step: str
    bundle: Artifact
    bytes: int
    quality: Estimate
    change: Estimate | None = None
    other_outputs: dict[str, StageQuality] = Field(default_factory=dict, exclude_if=operator.not_)

    def of(self, metric: str) -> StageQuality:
        """Return the quality of the output with this metric: a further output, or the first one."""
        first = StageQuality(quality=self.quality, change=self.change)
        return self.other_outputs.get(metric, first)


Stages = TypeAdapter(tuple[Stage, ...])


class TargetReport(Frozen):
    """The result for one target.

    Attributes:
        target: name of the target.
        required: whether the order requires this target; an optional one may be skipped.
        artifact: the graphs or engines.
        bytes: bytes of the graphs with their weights, or of the engines.
        verdict: the verdict on the order's limits.
        lowering: description of the graphs.
        audits: the audit of each engine.
    """

    target: str
    required: bool
    artifact: Artifact
    bytes: int
    verdict: Verdict
    lowering: Lowering
    audits: dict[str, dict[str, object]] = Field(
        default_factory=dict, description="Audit of each engine, by the name of its graph."
    )


class Reproduction(Frozen):
    """How to run an order again: the command, and the order as the contents of ``ORDER_FILE``."""

    command: str
    order: dict[str, Any]


class Report(Frozen):
    """An order and its result; every registry version refers to a report.

    ``source`` and ``compressed`` are the bundles before and after, ``validation`` the data checks,
    ``calibrated_on`` the split that calibrated the steps, with its rows, as text.
    """

    schema_version: int = 1
    order: str = Field(description="Digest of the order: of everything that affects the result.")
    recpress_version: str = Field(
        "", description="Version of recpress that ran the order; empty in older reports."
    )
    name: str
    bundle_version: str
    metric: str = Field(description="The metric by which the first output is judged.")
    other_metrics: tuple[str, ...] = Field(
        (), exclude_if=operator.not_, description="The metrics of further outputs."
    )
    source: Artifact
    compressed: Artifact
    champion: Artifact | None = Field(
        None,
        description="The champion's graphs for the first measured target, if a limit needs them.",
    )
    other_champions: dict[str, Artifact] = Field(
        default_factory=dict,
        exclude_if=operator.not_,
        description="The champion's graphs for the other measured targets, by target.",
    )
    recipe: tuple[dict[str, Any], ...]
    limits: tuple[Limit, ...]
    plan: Plan
    outcome: Outcome
    targets: tuple[TargetReport, ...] = Field(min_length=1)
    skipped: dict[str, str] = Field(
        default_factory=dict, description="Optional targets that were skipped, with the reason."
    )
    idle_reasons: dict[str, Reason] = Field(
        default_factory=dict,
        description="Steps that were skipped, with the reason. In JSON, 'idle' has the sentences.",
    )
    remark_reasons: tuple[Reason, ...] = Field(
        (),
        description="Other decisions: the quality budget, units that steps skipped, steps that "
        "changed nothing. In JSON, 'remarks' has the sentences.",
    )
    stages: tuple[Stage, ...] = Field(
        (),
        description="Effect of each step, measured in torch on the test rows. It does not affect "
        "the verdict.",
    )
    baseline_bytes: int
    measurement: Measurement | None = Field(
        description="Measurements of the first measured target."
    )
    other_measurements: dict[str, Measurement] = Field(
        default_factory=dict,
        exclude_if=operator.not_,
        description="Measurements of the other measured targets, by target.",
    )
    validation: Artifact
    calibrated_on: str
    reproduction: Reproduction

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric by which each output is judged."""
        return (self.metric, *self.other_metrics)

    @property
    def first_measured(self) -> TargetReport | None:
        """The first target that was measured; None if there is none.

        ``baseline_bytes`` are the bytes of the untouched model for this target.
        """
        measured = (item for item in self.targets if item.verdict.outcome != "built-unmeasured")
        return next(measured, None)

    @property
    def measured(self) -> dict[str, Measurement]:
        """The measurements of all measured targets, by target, in the order of the targets."""
        if self.measurement is None:
            return {}
        first = self.first_measured or self.targets[0]
        return {first.target: self.measurement, **self.other_measurements}

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def idle(self) -> dict[str, str]:
        """The reasons of skipped steps as sentences, by the step's kind."""
        return {step: str(reason) for step, reason in self.idle_reasons.items()}

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def remarks(self) -> tuple[str, ...]:
        """The other decisions as sentences."""
        return tuple(map(str, self.remark_reasons))

    @model_validator(mode="wrap")
    @classmethod
    def _read_sentences(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Read reports of earlier versions, which have sentences instead of reasons."""
        return read_reasons(
            data,
            lambda fields: read_reasons(fields, validate, "remarks", "remark_reasons"),
            "idle",
            "idle_reasons",
        )


class Finished(Frozen):
    """A published report.

    Attributes:
        report: the report.
        release: the artifact with the report.
        version: number of its version in the registry.
        registry: the registry's URI, without credentials.
    """

    report: Report
    release: Artifact
    version: str
    registry: str

    def fetch_command(self) -> str:
        """Return the command that fetches the first target, with the flag its verdict requires."""
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
    """Return the URI of the page of a release's report."""
    return store().file_uri(release, PAGE)


def page_reference(release: Artifact) -> str:
    """Return a reference to the page that stays valid if the store's folder is moved.

    It is relative to the store if the store is a folder; otherwise it is the URI.
    """
    if store().folder is None:
        return page_uri(release)
    return f"{store().reference(release)}/files/{PAGE}"


def read_measurement(artifact: Artifact) -> Measurement:
    """Read a stored measurement."""
    return read_document(Measurement, local(artifact) / "measurement.json")


def read_report(release: Artifact) -> Report:
    """Read a stored report, verified by its hash.

    Raises:
        ArtifactMissing, ArtifactDamaged: the release is missing or damaged.
        RecordRefused: its report does not have the fields of a report.
    """
    try:
        return validate_json(Report, store().file(release, REPORT))
    except ValidationError as fault:
        first = fault.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise RecordRefused(
            "report_unusable",
            release=store().uri_of(release),
            file=REPORT,
            problem=f"{escape_message(field)}: {escape_message(first['msg'])}",
        ) from fault
    except ValueError as fault:
        raise RecordRefused(
            "report_unusable",
            release=store().uri_of(release),
            file=REPORT,
            problem=escape_message(fault),
        ) from fault
