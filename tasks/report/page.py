"""The report as one HTML page: no network, no script, everything escaped. No Prefect.

The pictures stand beside the numbers they show, so nothing is said by a picture alone.
"""

import json
from html import escape

from compressors.contracts import Artifact, PlanLine
from compressors.lower.parity import Parity
from infra.bundle.json_reader import read_document
from infra.data.expectations import Validation
from infra.data.validation_page import findings, summary
from infra.pages import pictures
from infra.pages.html import document, many, scrollable, table
from infra.pages.pictures import BarSegment
from tasks.orchestration.documents import ORDER_FILE, LoweredGraph, Report, TargetReport
from tasks.orchestration.workspace import local
from tasks.report.cells import change_of, label, largest_first, packed, reason_and_warning, widened
from tasks.report.measured import TONES, WORDS, latency, limits
from tasks.report.stages import stage_table
from tasks.report.tables import headline, resolution

LARGEST = 20
"""Lines of a plan that are always shown; more are folded away, the largest first."""

_STYLE = (
    pictures.STYLE
    + """
.kicker { color: var(--soft); font-size: 0.875rem; margin: 0; }
h1 { margin-bottom: 1.25rem; overflow-wrap: anywhere; }
h1 .soft { font-weight: 400; }
.counts small { display: block; color: var(--soft); font-size: 0.825rem; line-height: 1.45; }
nav { margin: 1.25rem 0 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.1rem;
  font-size: 0.925rem; }
nav a { color: var(--soft); text-underline-offset: 3px; }
nav a:hover { color: var(--ink); }
h2 { scroll-margin-top: 1rem; }
p + .wide, p + figure { margin-top: 0.75rem; }
.gap { margin-top: 0.9rem; }
.measured, .measured small { white-space: nowrap; font-variant-numeric: tabular-nums; }
.picture { min-width: 13rem; width: 36%; }
tbody th { min-width: 8.5rem; }
.reason { min-width: 13rem; }
.bars { min-width: 8rem; width: 22%; }
td.bars { padding-top: 0.75rem; }
.facts th { color: var(--soft); width: 13rem; min-width: 9rem; }
td small, th small { display: block; color: var(--soft); font-size: 0.85rem; }
.hash { overflow-wrap: anywhere; } .hash small { overflow-wrap: anywhere; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 1rem 1.25rem; }
figure + figure, figure + .wide, .wide + details { margin-top: 0.75rem; }
figcaption { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font-size: 0.875rem;
  color: var(--soft); margin-bottom: 0.9rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 0.75rem; margin-top: 0.75rem; }
.charts figure { margin: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 0.75rem 0; padding: 0.9rem 1.15rem; overflow-x: auto; font-size: 0.925rem; }
pre code { background: none; padding: 0; }
ul.plain { margin: 0.5rem 0; padding-left: 1.15rem; max-width: 46rem; }
@media (max-width: 40rem) {
  main { padding: 1.75rem 1rem 3rem; }
  th, td { padding: 0.55rem 0.7rem; }
}
"""
)


def page(report: Report, validation: Validation) -> str:
    """Render a report as one self-contained HTML page.

    Args:
        report: what the order came to.
        validation: what the checks of its data said.

    Returns:
        HTML with inline style and inline SVG only. The same report gives the same page.
    """
    name, version = escape(report.name), escape(report.bundle_version)
    sections = {
        "numbers": ("Before and after", _numbers(report)),
        "limits": ("Limits and quality", limits(report)),
        "latency": ("Latency", latency(report)),
        "stages": ("What each step was worth", stage_table(report)),
        "plan": ("Plan and bytes", _plan(report)),
        "data": ("Data checks", _data(validation)),
        "targets": ("Targets", _targets(report)),
        "hashes": ("Made from", _hashes(report)),
        "again": ("Carry it out again", _again(report)),
    }
    links = (f'<a href="#{anchor}">{title}</a>' for anchor, (title, _) in sections.items())
    body = [
        '<p class="kicker">recpress report</p>',
        f'<h1>{name} <span class="soft">{version}</span></h1>',
        _verdict(report),
        _cards(report, validation),
        f'<nav aria-label="Sections">{"".join(links)}</nav>',
        *(
            f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{title}</h2>{content}</section>'
            for anchor, (title, content) in sections.items()
        ),
    ]
    return document(f"{report.name} {report.bundle_version}: {report.outcome}", body, _STYLE)


def validation_of(artifact: Artifact) -> Validation:
    """A stored validation."""
    return read_document(Validation, local(artifact) / "validation.json")


# --- what it came to -------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    lines = [f"<p>{escape(t.target)}: {escape(t.verdict.reason)}</p>" for t in report.targets]
    return (
        f'<div class="verdict {TONES[report.outcome]}">'
        f"<strong>{escape(report.outcome.capitalize())}</strong>{''.join(lines)}</div>"
    )


def _cards(report: Report, validation: Validation) -> str:
    """The few numbers one asks for first."""
    served = _measured_target(report)
    cards = []
    if served is not None:
        cards.append(
            (
                "Bytes served",
                f"{served.bytes / report.baseline_bytes:.2f}x",
                f"{report.baseline_bytes:,} to {served.bytes:,}",
            )
        )
    measured = report.measurement
    for metric in (report.metric, "p99_ms@64", "p50_ms@1"):
        if measured is None or len(cards) == 3:
            break
        changed = measured.numbers.of(metric, "baseline")
        if changed is None:
            continue
        said = change_of(changed, latency="_ms@" in metric)
        value, _, interval = said.partition(" ")
        title = label(metric)
        cards.append((title if "_ms@" in metric else f"{title} against before", value, interval))
    word, _, _ = summary(validation)
    cards.append((word, f"{validation.evaluated} of {validation.intended}", "checks evaluated"))
    cells = (
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for title, value, more in cards
    )
    return f'<dl class="counts">{"".join(cells)}</dl>'


def _numbers(report: Report) -> str:
    rows = headline(report)
    columns = list(rows[0])
    heads = ["", *(escape(column) for column in columns[1:])]
    lines = [
        f'<tr><th scope="row">{escape(row["what"])}</th>'
        + "".join(
            f'<td class="number">{escape(row.get(column, ""))}</td>' for column in columns[1:]
        )
        + "</tr>"
        for row in rows
    ]
    note = (
        "The change is a difference for quality and a ratio for bytes and latency, after to "
        "before, with its 95 % interval. A dash: not measured."
    )
    return (
        scrollable(table(heads, lines, heads[1:]), "numbers")
        + f'<p class="soft gap">{escape(resolution(report))} {note}</p>'
    )


# --- plan and bytes --------------------------------------------------------------------------


def _plan(report: Report) -> str:
    ordered = largest_first(report.plan.lines)
    shown, folded = ordered[:LARGEST], ordered[LARGEST:]
    if len(folded) < 4:  # opening a fold for so few is more work than reading them
        shown, folded = ordered, []
    most = max((max(line.bytes_before, line.bytes_after) for line in ordered), default=0)
    steps = [
        f"<li><code>{escape(str(step['kind']))}</code> {escape(_settings(step))}</li>"
        for step in report.recipe
    ]
    steps += [
        f"<li><code>{escape(kind)}</code> was left out: {escape(why)}</li>"
        for kind, why in report.idle.items()
    ]
    steps += [f"<li>{escape(remark)}</li>" for remark in report.remarks]
    parts = [
        f'<ul class="plain">{"".join(steps)}</ul>',
        f'<p class="soft">{escape(f"Calibrated on: {report.calibrated_on}.")}</p>',
        _composition(report.plan.lines),
        scrollable(_plan_table(shown, most), "plan"),
    ]
    if folded:
        before = sum(line.bytes_before for line in folded)
        after = sum(line.bytes_after for line in folded)
        parts.append(
            f'<details><summary id="smaller"><b>{many(len(folded), "smaller one")}</b>'
            f'<span class="soft">{before:,} to {after:,} bytes</span></summary>'
            f"{scrollable(_plan_table(folded, most), 'smaller')}</details>"
        )
    return "".join(parts)


def _composition(lines: tuple[PlanLine, ...]) -> str:
    before = [
        BarSegment(name=line.module, role=line.role, size=line.bytes_before) for line in lines
    ]
    after = [BarSegment(name=line.module, role=line.role, size=line.bytes_after) for line in lines]
    totals = [sum(part.size for part in parts) for parts in (before, after)]
    names = {"table": "embedding tables", "dense": "dense layers", "other": "everything else"}
    keys = []
    for role, name in names.items():
        old, new = (sum(p.size for p in parts if p.role == role) for parts in (before, after))
        if old or new:
            keys.append(f'<span><i class="key {role}"></i>{name}: {old:,} to {new:,} bytes</span>')
    drawn = pictures.composition(
        [
            (f"before: {totals[0]:,} bytes of weights", before),
            (f"after: {totals[1]:,} bytes", after),
        ],
        f"Bytes of weights by table and layer: {totals[0]:,} before, {totals[1]:,} after",
    )
    return f'<figure class="gap"><figcaption>{"".join(keys)}</figcaption>{drawn}</figure>'


def _plan_table(lines: list[PlanLine], most: int) -> str:
    rows = [
        f'<tr><th scope="row"><code>{escape(line.module)}</code></th>'
        f"<td>{escape(line.role)}</td><td>{escape(line.format)}</td>"
        f'<td class="bars">{pictures.pair(line.bytes_before, line.bytes_after, most, line.role)}'
        f'</td><td class="number">{line.bytes_before:,}</td>'
        f'<td class="number">{line.bytes_after:,}</td>'
        f"<td>{escape(reason_and_warning(line))}</td></tr>"
        for line in lines
    ]
    heads = ("Table or layer", "Role", "Stored as", "Before and after", "Bytes before", "After")
    return table((*heads, "Why"), rows, ("Bytes before", "After"))


# --- data, targets ---------------------------------------------------------------------------


def _data(validation: Validation) -> str:
    word, why, tone = summary(validation)
    said = (
        f'<p><span class="{WORDS[tone]}">{word}.</span> {validation.evaluated} of '
        f"{many(validation.intended, 'intended check')} evaluated. {why}</p>"
    )
    return said + findings(validation, "h3")


def _targets(report: Report) -> str:
    parts = [_target(place, target) for place, target in enumerate(report.targets)]
    parts += [
        f"<h3>{escape(name)}</h3><p>Left out, as it was optional: {escape(why)}</p>"
        for name, why in report.skipped.items()
    ]
    return "".join(parts)


def _target(place: int, target: TargetReport) -> str:
    lowering, tone = target.lowering, TONES[target.verdict.outcome]
    facts = {
        "Verdict": f'<span class="{WORDS[tone]}">{target.verdict.outcome}</span>'
        f"<small>{escape(target.verdict.reason)}</small>",
        "Ordered as": "required" if target.required else "optional",
        "Bytes served": f"{target.bytes:,}, of them {lowering.served_packed_bytes:,} of packed "
        f"weights",
    }
    for graph in lowering.graphs:
        found = _graph(graph, target.audits.get(graph.name, {}))
        several = len(lowering.graphs) > 1
        facts |= {
            f"{name}, {graph.name}" if several else name: said for name, said in found.items()
        }
    rows = (
        f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in facts.items()
    )
    listed = f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'
    anchor = f"target-{place}"
    return f'<h3 id="{anchor}">{escape(target.target)}</h3>{scrollable(listed, anchor)}'


def _graph(graph: LoweredGraph, audit: dict[str, object]) -> dict[str, str]:
    """What was found about one graph of a target, as names and HTML."""
    facts = {
        f"{graph.output.capitalize()}s against torch": _parity(graph.rows_parity, "rows of data")
        + _parity(graph.edge_parity, "made-up rows at the edges"),
    }
    if graph.audit is not None:
        nodes = ", ".join(f"{count} {name}" for name, count in graph.audit.nodes.items())
        facts["Optimized graph"] = (
            f"{many(graph.audit.int8_products, 'int8 product')}, "
            f"{packed(graph.audit)}, "
            f"{graph.audit.weight_bytes:,} bytes of weights; {widened(graph.audit)}"
            f"<small>{escape(nodes)}</small>"
        )
        if graph.sparse_layers:
            facts["Sparsity"] = (
                f"did not pay<small>{many(len(graph.sparse_layers), 'layer')} with 2:4 zeros, "
                f"which ONNX Runtime stores and multiplies like other weights</small>"
            )
    facts |= {
        escape(name.replace("_", " ").capitalize()): escape(_plain(value))
        for name, value in audit.items()
        if value is not None or not name.startswith("sparsity")
    }
    inputs = "; ".join(
        f"{item.name} {item.dtype} [{', '.join(['rows', *map(str, item.shape)])}]"
        for item in graph.inputs
    )
    facts["Inputs"] = escape(inputs)
    facts["Output"] = escape(
        graph.output if graph.width is None else f"{graph.output} [rows, {graph.width}]"
    )
    return facts


def _parity(parity: Parity, rows: str) -> str:
    return (
        f"<div>at most {parity.largest:.2g} apart (allowed {parity.largest_limit:.2g}), root mean "
        f"square {parity.root_mean_square:.2g} (allowed {parity.rms_limit:.2g}), on "
        f"{parity.rows:,} {rows}</div>"
    )


# --- where it came from ----------------------------------------------------------------------


def _hashes(report: Report) -> str:
    named: list[tuple[str, Artifact]] = [
        ("Bundle", report.source),
        ("Compressed bundle", report.compressed),
        ("Data validation", report.validation),
    ]
    if report.champion is not None:
        named.append(("Champion compared with", report.champion))
    named += [(f"{target.target} artifact", target.artifact) for target in report.targets]
    rows = [
        f'<tr><th scope="row">Order</th><td class="hash"><code>{report.order}</code></td>'
        '<td class="number"></td></tr>'
    ]
    rows += [
        f'<tr><th scope="row">{escape(name)}</th><td class="hash"><code>{item.sha256}</code>'
        f'<small>{escape(item.uri)}</small></td><td class="number">{item.bytes:,}</td></tr>'
        for name, item in named
    ]
    return scrollable(
        table(("What", "SHA-256, and where it lies", "Bytes"), rows, ("Bytes",)), "hashes"
    )


def _again(report: Report) -> str:
    again = report.reproduction
    order = escape(json.dumps(again.order, indent=1))
    by_file = ORDER_FILE in again.command
    whole = (
        f"<p>with <code>{ORDER_FILE}</code>:</p><pre><code>{order}</code></pre>"
        if by_file
        else "<details><summary>The same order as a file, for <code>--order</code></summary>"
        f"<pre><code>{order}</code></pre></details>"
    )
    return (
        f"<pre><code>{escape(again.command)}</code></pre>{whole}"
        '<p class="soft">The digest of the order also holds the code of recpress and of the '
        "architecture and the versions of the libraries: the same digest is the same result, up to "
        "the latency of another machine.</p>"
    )


def _measured_target(report: Report) -> TargetReport | None:
    return next((t for t in report.targets if t.target == "onnxruntime"), None)


def _settings(step: dict[str, object]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in step.items() if name != "kind")


def _plain(value: object) -> str:
    match value:
        case None:
            return "none"
        case str():
            return value
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case list():
            return ", ".join(map(_plain, value)) or "none"
        case dict():
            return (
                ", ".join(f"{name} {_plain(item)}" for name, item in sorted(value.items()))
                or "none"
            )
    return json.dumps(value)
