"""Our own page for a validation result: one HTML file that needs no network and no script.

The pages Great Expectations builds load their style from elsewhere and cannot be read offline.
Everything shown is escaped: column names and values come from somebody's data.
"""

from html import escape

from infra.expectations import Finding, Validation

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2329; --soft: #5a646e; --line: #e2dfd9;
  --good: #17663f; --good-wash: #e6f2ea; --bad: #a3261b; --bad-wash: #fbeae7;
  --code: #f2f0ec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --card: #1c2024; --ink: #e7e9ea; --soft: #9ea8b1; --line: #30363c;
    --good: #7fd1a3; --good-wash: #173226; --bad: #ff9d8f; --bad-wash: #3b1f1b;
    --code: #262b30;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.5rem; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 0.75rem; }
p { margin: 0.25rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.verdict { border-radius: 10px; padding: 1.1rem 1.35rem; border-left: 5px solid; }
.verdict strong { display: block; font-size: 1.3rem; line-height: 1.3; }
.held { background: var(--good-wash); border-color: var(--good); }
.broken { background: var(--bad-wash); border-color: var(--bad); }
.held strong, .good { color: var(--good); }
.broken strong, .bad { color: var(--bad); }
.good, .bad { font-weight: 600; white-space: nowrap; }
.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr));
  gap: 0.75rem; margin: 1rem 0 0; }
.counts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.75rem 1rem; }
.counts dt { color: var(--soft); font-size: 0.875rem; }
.counts dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.925rem; }
th, td { text-align: left; vertical-align: top; padding: 0.6rem 1rem; }
thead th { color: var(--soft); font-weight: 600; font-size: 0.825rem; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 400; }
code { font: 0.9em/1.4 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", monospace;
  background: var(--code); border-radius: 4px; padding: 0.1em 0.35em; overflow-wrap: break-word; }
.rows { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: 0.3rem 0.9rem; min-width: 12rem; }
.rows li { white-space: nowrap; font-variant-numeric: tabular-nums; }
.rows code { white-space: normal; }
details { margin: 0.6rem 0; }
summary { cursor: pointer; padding: 0.45rem 0.25rem; }
summary b { margin-right: 0.5rem; }
@media print { body { background: none; } .wide { overflow: visible; } }
"""


def validation_page(validation: Validation, title: str) -> str:
    """Render a validation as one self-contained HTML page.

    Args:
        validation: what the checks said.
        title: the page's heading, as plain text.

    Returns:
        HTML with inline style only: verdict, counts, the failing checks with their rows, then
        every check by split.
    """
    failing = [found for found in validation.findings if not found.success]
    splits = list(dict.fromkeys(found.split for found in validation.findings))
    name = escape(title)
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{name}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{name}</h1>",
        _verdict(validation, failing),
        _counts(validation, failing, splits),
        _failing(failing),
        _everything(validation, splits),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _verdict(validation: Validation, failing: list[Finding]) -> str:
    unknown = validation.intended - validation.evaluated
    broken = sum(found.evaluated for found in failing)
    if validation.success:
        word, why = "Data passed", "Every intended check was evaluated, and every one held."
    elif validation.intended == 0:
        word, why = "Nothing was checked", "No check was intended, so nothing is known."
    elif broken == 0:
        word = "Data was not fully checked"
        why = f"{_many(unknown, 'check')} could not be evaluated, and so did not pass."
    else:
        rest = f"; {unknown} more could not be evaluated" if unknown else ""
        word, why = "Data failed", f"{_many(broken, 'check')} did not hold{rest}."
    tone = "held" if validation.success else "broken"
    return f'<div class="verdict {tone}"><strong>{word}</strong><p>{why}</p></div>'


def _counts(validation: Validation, failing: list[Finding], splits: list[str]) -> str:
    facts = {
        "Checks evaluated": f"{validation.evaluated} of {validation.intended}",
        "Not passed": str(len(failing)),
        "Splits": str(len(splits)),
        "Time": f"{validation.seconds:.1f} s",
    }
    cells = (f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts.items())
    return f'<dl class="counts">{"".join(cells)}</dl>'


def _failing(failing: list[Finding]) -> str:
    if not failing:
        return ""
    # What broke comes before what could not be looked at, which often follows from it.
    ordered = sorted(failing, key=lambda found: not found.evaluated)
    rows = [
        f'<tr><th scope="row">{escape(found.split)}</th><td>{_column(found)}</td>'
        f"<td>{escape(found.rule)}</td><td>{escape(found.observed)}</td>"
        f"<td>{_rows(found)}</td></tr>"
        for found in ordered
    ]
    table = _table(("Split", "Column", "Needed", "Found", "Rows, with their values"), rows)
    return (
        '<section aria-labelledby="failing"><h2 id="failing">What did not pass</h2>'
        '<p class="soft">Rows are numbered from 0, in the order of the file or of the sorted part '
        f"files.</p>{_scrollable(table, 'failing')}</section>"
    )


def _everything(validation: Validation, splits: list[str]) -> str:
    if not splits:
        return ""
    blocks = []
    for place, split in enumerate(splits):
        found_here = [found for found in validation.findings if found.split == split]
        held = sum(found.success for found in found_here)
        rows = [
            f'<tr><th scope="row">{_column(found)}</th><td>{escape(found.rule)}</td>'
            f"<td>{_result(found)}</td><td>{escape(found.observed)}</td></tr>"
            for found in found_here
        ]
        table = _table(("Column", "Check", "Result", "Found"), rows)
        tone = "good" if held == len(found_here) else "bad"
        blocks.append(
            f'<details><summary id="split-{place}"><b>{escape(split)}</b>'
            f'<span class="{tone}">{held} of {_many(len(found_here), "check")} passed</span>'
            f"</summary>{_scrollable(table, f'split-{place}')}</details>"
        )
    return (
        '<section aria-labelledby="all"><h2 id="all">All checks by split</h2>'
        + "".join(blocks)
        + "</section>"
    )


def _table(heads: tuple[str, ...], rows: list[str]) -> str:
    head = "".join(f'<th scope="col">{label}</th>' for label in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _scrollable(table: str, label: str) -> str:
    """A wide table scrolls inside its frame; the frame takes focus, so keys can scroll it."""
    return f'<div class="wide" role="region" tabindex="0" aria-labelledby="{label}">{table}</div>'


def _column(found: Finding) -> str:
    if found.column is None:
        return '<span class="soft">whole split</span>'
    return f"<code>{escape(found.column)}</code>"


def _rows(found: Finding) -> str:
    if not found.failing_rows:
        return '<span class="soft">none to name</span>'
    pairs = zip(found.failing_rows, found.failing_values, strict=True)
    items = [f"<li>{row}: <code>{escape(value)}</code></li>" for row, value in pairs]
    more = found.failing_count - len(items)
    if more > 0:
        items.append(f'<li class="soft">and {_many(more, "more value")}</li>')
    return f'<ul class="rows">{"".join(items)}</ul>'


def _result(found: Finding) -> str:
    if found.success:
        return '<span class="good">passed</span>'
    word = "failed" if found.evaluated else "not evaluated"
    return f'<span class="bad">{word}</span>'


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
