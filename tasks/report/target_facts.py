"""Render the page's section on the graphs and engines of each target. No Prefect."""

from dataclasses import dataclass

from compressors.lower.findings import Parity
from infra.pages.html import format_count
from tasks.orchestration.documents import Report, TargetReport
from tasks.orchestration.graph_documents import GraphInput, LoweredGraph
from tasks.report.cells import (
    audit_heading,
    describe_dense_layers,
    describe_matmuls,
    describe_packed_tables,
    format_audit_value,
    target_label,
)
from tasks.report.measured import TEXT_CLASSES, TONES


@dataclass(frozen=True)
class Fact:
    """The value of one row of a target's table on the page; ``TargetFacts`` has the row's name.

    Attributes:
        text: the value.
        tone: CSS class of the text's colour; empty for none.
        note: text below the fact; None if there is none.
        lines: additional lines of text.
    """

    text: str = ""
    tone: str = ""
    note: str | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetFacts:
    """A target that was built, with its facts by name."""

    name: str
    facts: tuple[tuple[str, Fact], ...]


@dataclass(frozen=True)
class TargetsSection:
    """The targets that were built, and the skipped ones with the reason."""

    built: tuple[TargetFacts, ...]
    skipped: tuple[tuple[str, str], ...]


def targets_section(report: Report) -> TargetsSection:
    """Return the facts about each target that was built, and the skipped targets."""
    return TargetsSection(
        built=tuple(_build_target_with_facts(target) for target in report.targets),
        skipped=tuple(report.skipped.items()),
    )


def _build_target_with_facts(target: TargetReport) -> TargetFacts:
    """Return the facts about a target, then those about each of its graphs."""
    lowering, verdict = target.lowering, target.verdict
    packed_bytes = f"{lowering.served_packed_bytes:,}"
    facts = {
        "Verdict": Fact(verdict.outcome, TEXT_CLASSES[TONES[verdict.outcome]], verdict.reason),
        "Ordered as": Fact("required" if target.required else "optional"),
        "Bytes served": Fact(f"{target.bytes:,}, of which {packed_bytes} are weights"),
    }
    for graph in lowering.graphs:
        audit = target.audits.get(graph.name, {})
        graph_facts = _list_graph_facts(graph, audit, target_label(target.target))
        has_several_graphs = len(lowering.graphs) > 1
        facts |= {
            f"{name}, {graph.name}" if has_several_graphs else name: fact
            for name, fact in graph_facts.items()
        }
    return TargetFacts(target.target, tuple(facts.items()))


def _list_graph_facts(
    graph: LoweredGraph, audit: dict[str, object], runtime: str
) -> dict[str, Fact]:
    """Return the facts about one graph of a target, by name.

    Args:
        graph: the graph.
        audit: the audit of its engine; empty if the graph is served without building an engine.
        runtime: name of the runtime.
    """
    facts = {
        f"{graph.output.capitalize()}s against torch": Fact(
            lines=(
                _format_parity(graph.rows_parity, "rows of data"),
                _format_parity(graph.edge_parity, "synthetic edge cases"),
            )
        )
    }
    if graph.audit is not None:
        facts["Optimized graph"] = Fact(
            f"{describe_matmuls(graph.audit)}, "
            f"{describe_packed_tables(graph.audit)}, "
            f"{graph.audit.weight_bytes:,} bytes of weights; {describe_dense_layers(graph.audit)}",
            note=", ".join(f"{count} {name}" for name, count in graph.audit.nodes.items()),
        )
        if graph.sparse_layers:
            facts["2:4 zeros"] = Fact(
                "no effect",
                note=f"{format_count(len(graph.sparse_layers), 'layer')} with 2:4 zeros, which "
                f"{runtime} stores and multiplies like other weights",
            )
    facts |= {
        audit_heading(field).capitalize(): Fact(format_audit_value(field, value))
        for field, value in audit.items()
        if value is not None or not field.startswith("sparsity")
    }
    inputs = (
        f"{item.name} {item.dtype} [{', '.join(['rows', *_format_dimensions(item)])}]"
        for item in graph.inputs
    )
    facts["Inputs"] = Fact("; ".join(inputs))
    width = "" if graph.width is None else f" [rows, {graph.width}]"
    label = "Outputs" if graph.several_outputs else "Output"
    facts[label] = Fact(", ".join(f"{name}{width}" for name in graph.outputs))
    return facts


def _format_dimensions(item: GraphInput) -> list[str]:
    """Format the dimensions of a graph's input after the first, such as ``1 to 50``."""
    if item.shortest is not None:
        return [f"{item.shortest} to {item.shape[0]}"]
    return [str(size) for size in item.shape]


def _format_parity(parity: Parity, rows: str) -> str:
    """Format the differences between a graph and its torch module, with their limits."""
    of_output = f" (of {parity.output}, the closest to its limit)" if parity.output else ""
    by_rounding = (
        f"; rounding errors alone change the module's by {parity.by_rounding:.2g}"
        if parity.by_rounding
        else ""
    )
    return (
        f"differ{of_output} by at most {parity.largest:.2g} (allowed {parity.largest_limit:.2g}), "
        f"root mean square {parity.root_mean_square:.2g} (allowed {parity.rms_limit:.2g}), on "
        f"{parity.rows:,} {rows}{by_rounding}"
    )
