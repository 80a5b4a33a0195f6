"""The report page's section on the graphs and engines of each target. No Prefect."""

from dataclasses import dataclass

from compressors.lower.findings import Parity
from infra.pages.html import many
from tasks.orchestration.documents import LoweredGraph, Report, TargetReport
from tasks.report.cells import as_text, label_of, packed, widened
from tasks.report.measured import TONES, WORDS


@dataclass(frozen=True)
class Fact:
    """One fact about a target, without its name.

    Attributes:
        text: the fact.
        tone: class of the text's colour; empty for none.
        note: text below the fact; None if there is none.
        lines: additional lines of text.
    """

    text: str = ""
    tone: str = ""
    note: str | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A target that was built, with its facts by name."""

    name: str
    facts: tuple[tuple[str, Fact], ...]


@dataclass(frozen=True)
class TargetsSection:
    """The targets that were built, and the skipped ones with the reason."""

    built: tuple[Target, ...]
    skipped: tuple[tuple[str, str], ...]


def targets_section(report: Report) -> TargetsSection:
    """Return the facts about each target that was built, and the skipped targets."""
    return TargetsSection(
        built=tuple(_target(target) for target in report.targets),
        skipped=tuple(report.skipped.items()),
    )


def _target(target: TargetReport) -> Target:
    lowering, verdict = target.lowering, target.verdict
    packed_bytes = f"{lowering.served_packed_bytes:,}"
    facts = {
        "Verdict": Fact(verdict.outcome, WORDS[TONES[verdict.outcome]], verdict.reason),
        "Ordered as": Fact("required" if target.required else "optional"),
        "Bytes served": Fact(f"{target.bytes:,}, of them {packed_bytes} of packed weights"),
    }
    for graph in lowering.graphs:
        found = _graph(graph, target.audits.get(graph.name, {}), label_of(target.target))
        several = len(lowering.graphs) > 1
        facts |= {
            f"{name}, {graph.name}" if several else name: fact for name, fact in found.items()
        }
    return Target(target.target, tuple(facts.items()))


def _graph(graph: LoweredGraph, audit: dict[str, object], runtime: str) -> dict[str, Fact]:
    """Return the facts about one graph of a target, by name."""
    facts = {
        f"{graph.output.capitalize()}s against torch": Fact(
            lines=(
                _parity(graph.rows_parity, "rows of data"),
                _parity(graph.edge_parity, "made-up rows at the edges"),
            )
        )
    }
    if graph.audit is not None:
        facts["Optimized graph"] = Fact(
            f"{many(graph.audit.int8_products, 'int8 product')}, "
            f"{packed(graph.audit)}, "
            f"{graph.audit.weight_bytes:,} bytes of weights; {widened(graph.audit)}",
            note=", ".join(f"{count} {name}" for name, count in graph.audit.nodes.items()),
        )
        if graph.sparse_layers:
            facts["Sparsity"] = Fact(
                "did not pay",
                note=f"{many(len(graph.sparse_layers), 'layer')} with 2:4 zeros, which {runtime} "
                "stores and multiplies like other weights",
            )
    facts |= {
        name.replace("_", " ").capitalize(): Fact(as_text(value))
        for name, value in audit.items()
        if value is not None or not name.startswith("sparsity")
    }
    inputs = (
        f"{item.name} {item.dtype} [{', '.join(['rows', *map(str, item.shape)])}]"
        for item in graph.inputs
    )
    facts["Inputs"] = Fact("; ".join(inputs))
    width = "" if graph.width is None else f" [rows, {graph.width}]"
    facts["Output"] = Fact(f"{graph.output}{width}")
    return facts


def _parity(parity: Parity, rows: str) -> str:
    return (
        f"at most {parity.largest:.2g} apart (allowed {parity.largest_limit:.2g}), root mean "
        f"square {parity.root_mean_square:.2g} (allowed {parity.rms_limit:.2g}), on "
        f"{parity.rows:,} {rows}"
    )
