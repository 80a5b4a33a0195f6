"""What our HTML pages have in common: one file each that needs no network and no script.

Calm in light and dark, readable in a narrow window, on paper and with a screen reader. Text given
to these functions is HTML already: whoever has text from somebody's model or data escapes it.
"""

from collections.abc import Collection, Iterable
from html import escape

from infra.printable import printable

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2329; --soft: #5a646e; --line: #e2dfd9;
  --good: #17663f; --good-wash: #e6f2ea; --bad: #a3261b; --bad-wash: #fbeae7;
  --open: #7a5200; --open-wash: #faf0d8; --code: #f2f0ec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --card: #1c2024; --ink: #e7e9ea; --soft: #9ea8b1; --line: #30363c;
    --good: #7fd1a3; --good-wash: #173226; --bad: #ff9d8f; --bad-wash: #3b1f1b;
    --open: #e6c06e; --open-wash: #352a12; --code: #262b30;
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
h3 { font-size: 1rem; margin: 1.75rem 0 0.6rem; }
p { margin: 0.25rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.verdict { border-radius: 10px; padding: 1.1rem 1.35rem; border-left: 5px solid; }
.verdict strong { display: block; font-size: 1.3rem; line-height: 1.3; }
.held { background: var(--good-wash); border-color: var(--good); }
.broken { background: var(--bad-wash); border-color: var(--bad); }
.unsure { background: var(--open-wash); border-color: var(--open); }
.held strong, .good { color: var(--good); }
.broken strong, .bad { color: var(--bad); }
.unsure strong, .open { color: var(--open); }
.good, .bad, .open { font-weight: 600; white-space: nowrap; }
.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr));
  gap: 0.75rem; margin: 1rem 0 0; }
.counts div { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.75rem 1rem; }
.counts dt { color: var(--soft); font-size: 0.875rem; }
.counts dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.wide:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--soft);
  outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.925rem; }
th, td { text-align: left; vertical-align: top; padding: 0.6rem 1rem; }
thead th { color: var(--soft); font-weight: 600; font-size: 0.825rem; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 400; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
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

# Nothing is loaded and nothing is run, whatever a name in the page might try.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        title: of the window, as plain text.
        body: its parts, as HTML.
        style: CSS of this page, after what all pages share.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{style}</style>",
        "</head>",
        "<body>",
        "<main>",
        *body,
        "</main>",
        "</body>",
        "</html>",
    ]
    return printable("\n".join(part for part in parts if part) + "\n")


def table(heads: Iterable[str], rows: Iterable[str], numbers: Collection[str] = ()) -> str:
    """A table of finished rows; the columns named in ``numbers`` have their heads to the right."""
    head = "".join(
        f'<th scope="col" class="number">{label}</th>'
        if label in numbers
        else f'<th scope="col">{label}</th>'
        for label in heads
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def scrollable(content: str, label: str) -> str:
    """A wide table scrolls inside its frame; the frame takes focus, so keys can scroll it.

    Args:
        content: the table.
        label: id of the element that names it.
    """
    return f'<div class="wide" role="region" tabindex="0" aria-labelledby="{label}">{content}</div>'


def many(count: int, thing: str) -> str:
    """``1 check``, ``2 checks``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
