"""Render the report as one HTML page. No Prefect.

The page loads nothing from the network, has no script, and all values in it are escaped. This file
and its neighbours select and format the texts; the HTML is in ``templates``, one file per section.
Every chart is next to its numbers, so that no information is only in a chart.
"""

import json
from dataclasses import dataclass

from compressors.contracts import Artifact
from compressors.contracts.metrics.serving import latency
from infra.bundle.json_reader import read_document
from infra.data.expectations import Validation
from infra.data.validation_page import CheckLists, check_lists, summary
from infra.pages import pictures
from infra.pages.html import format_count, render
from tasks.orchestration.documents import ORDER_FILE, Report
from tasks.orchestration.workspace import local
from tasks.report.cells import format_change, is_ratio, metric_label
from tasks.report.measured import TEXT_CLASSES, TONES, latency_section, limit_rows
from tasks.report.plan_section import plan_section
from tasks.report.stages import NumberTable, stage_section
from tasks.report.tables import describe_resolution, number_rows
from tasks.report.target_facts import targets_section

TEMPLATE = "tasks/report/templates/page.html.jinja"
MAX_NUMBER_CARDS = 3
"""Number of cards with measured numbers; one more card has the result of the data checks."""


@dataclass(frozen=True)
class Banner:
    """The verdict at the top of the page.

    Attributes:
        outcome: outcome of the order.
        tone: CSS class of its colour.
        lines: the reason of each target's verdict.
    """

    outcome: str
    tone: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """One of the main numbers at the top of the page, with a note below it.

    A value with an "x" is a ratio of the compressed model to the untouched model.
    """

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class DataSection:
    """The results of the data checks.

    Attributes:
        word: the result in a word.
        tone: CSS class of its colour.
        text: the number of checks, and the reason of the result.
        lists: the checks by result.
    """

    word: str
    tone: str
    text: str
    lists: CheckLists


@dataclass(frozen=True)
class NamedArtifact:
    """An artifact that the order read or wrote; ``bytes`` is the size as text."""

    name: str
    sha256: str
    uri: str
    bytes: str


@dataclass(frozen=True)
class HashesSection:
    """The digest of the order, and its artifacts."""

    order: str
    artifacts: tuple[NamedArtifact, ...]


@dataclass(frozen=True)
class AgainSection:
    """How to run the order again.

    Attributes:
        command: the shell command.
        order: the order as JSON.
        file: name of the file with the order.
        needs_file: whether the command reads that file.
    """

    command: str
    order: str
    file: str
    needs_file: bool


def page(report: Report, validation: Validation) -> str:
    """Render a report as one self-contained HTML page.

    Args:
        report: the order's report.
        validation: the results of its data checks.

    Returns:
        HTML with inline CSS and SVG. Equal arguments give equal pages.
    """
    return render(
        TEMPLATE,
        title=f"{report.name} {report.bundle_version}: {report.outcome}",
        picture_style=pictures.STYLE,
        name=report.name,
        version=report.bundle_version,
        banner=_build_banner(report),
        cards=_build_cards(report, validation),
        numbers=_build_numbers_section(report),
        limits=limit_rows(report),
        latency=latency_section(report),
        stages=stage_section(report),
        plan=plan_section(report),
        data=_build_data_section(validation),
        targets=targets_section(report),
        hashes=_build_hashes_section(report),
        again=_build_again_section(report),
    )


def read_validation(artifact: Artifact) -> Validation:
    """Read the stored result of the task ``validate``."""
    return read_document(Validation, local(artifact) / "validation.json")


# --- result ----------------------------------------------------------------------------------


def _build_banner(report: Report) -> Banner:
    return Banner(
        outcome=report.outcome.capitalize(),
        tone=TONES[report.outcome],
        lines=tuple(f"{t.target}: {t.verdict.reason}" for t in report.targets),
    )


def _build_cards(report: Report, validation: Validation) -> tuple[Card, ...]:
    """Return the main numbers: bytes, quality, one latency, and the data checks."""
    target = report.first_measured
    cards = []
    if target is not None:
        cards.append(
            Card(
                "Bytes served",
                f"{target.bytes / report.baseline_bytes:.2f}x",
                f"{report.baseline_bytes:,} to {target.bytes:,}",
            )
        )
    measurement = report.measurement
    # In this sequence until there are enough cards; p99 at batch 64 is preferred to p50 at batch 1.
    for metric in (*report.metrics, latency("p99", 64).name, latency("p50", 1).name):
        if measurement is None or len(cards) == MAX_NUMBER_CARDS:
            break
        change = measurement.numbers.of(metric, "baseline")
        if change is None:
            continue
        text = format_change(change, ratio=is_ratio(metric))
        value, _, interval = text.partition(" ")
        title = metric_label(metric)
        title = title if is_ratio(metric) else f"Change of {title}"
        cards.append(Card(title, value, interval))
    evaluated = f"{validation.evaluated} of {validation.intended}"
    cards.append(Card(summary(validation).word, evaluated, "checks evaluated"))
    return tuple(cards)


def _build_numbers_section(report: Report) -> NumberTable:
    rows = number_rows(report)
    columns = list(rows[0])
    note = (
        "The change is a difference for quality, and the ratio of after to before for bytes and "
        "latency, with its 95 % interval. A dash means not measured."
    )
    return NumberTable(
        heads=("", *columns[1:]),
        rows=tuple(tuple(row.get(column, "") for column in columns) for row in rows),
        note=f"{describe_resolution(report)} {note}",
    )


# --- data -----------------------------------------------------------------------------------


def _build_data_section(validation: Validation) -> DataSection:
    result = summary(validation)
    intended = format_count(validation.intended, "intended check")
    return DataSection(
        word=result.word,
        tone=TEXT_CLASSES[result.tone],
        text=f"{validation.evaluated} of {intended} evaluated. {result.reason}",
        lists=check_lists(validation),
    )


# --- artifacts -------------------------------------------------------------------------------


def _build_hashes_section(report: Report) -> HashesSection:
    named: list[tuple[str, Artifact]] = [
        ("Bundle", report.source),
        ("Compressed bundle", report.compressed),
        ("Data validation", report.validation),
    ]
    if report.champion is not None:
        named.append(("Champion compared with", report.champion))
    named += [(f"Champion of {name}", item) for name, item in report.other_champions.items()]
    named += [(f"{target.target} artifact", target.artifact) for target in report.targets]
    return HashesSection(
        order=report.order,
        artifacts=tuple(
            NamedArtifact(name, item.sha256, item.uri, f"{item.bytes:,}") for name, item in named
        ),
    )


def _build_again_section(report: Report) -> AgainSection:
    reproduction = report.reproduction
    return AgainSection(
        command=reproduction.command,
        order=json.dumps(reproduction.order, indent=1),
        file=ORDER_FILE,
        needs_file=ORDER_FILE in reproduction.command,
    )
