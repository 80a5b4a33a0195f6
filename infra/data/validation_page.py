"""Our own page for a validation result: one HTML file that needs no network and no script.

The pages Great Expectations builds load their style from elsewhere and cannot be read offline.
Everything shown is escaped: column names and values come from somebody's data.
"""

from html import escape

from infra.data.expectations import Finding, Validation
from infra.pages.html import document, many, scrollable, table


def validation_page(validation: Validation, title: str) -> str:
    """Render a validation as one self-contained HTML page.

    Args:
        validation: what the checks said.
        title: the page's heading, as plain text.

    Returns:
        HTML with inline style only: verdict, counts, the failing checks with their rows, then
        every check by split.
    """
    word, why, tone = summary(validation)
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            f'<div class="verdict {tone}"><strong>{word}</strong><p>{why}</p></div>',
            _counts(validation),
            findings(validation),
        ],
    )


def summary(validation: Validation) -> tuple[str, str, str]:
    """What came of the checks, in a word and in a sentence, and the class of its colour."""
    unknown = validation.intended - validation.evaluated
    broken = sum(found.evaluated for found in validation.findings if not found.success)
    if validation.success:
        why = "Every intended check was evaluated, and every one held."
        return "Data passed", why, "held"
    if validation.intended == 0:
        why = "No check was intended, so nothing is known."
        return "Nothing was checked", why, "broken"
    if broken == 0:
        why = f"{many(unknown, 'check')} could not be evaluated, and so did not pass."
        return "Data was not fully checked", why, "broken"
    rest = f"; {unknown} more could not be evaluated" if unknown else ""
    return "Data failed", f"{many(broken, 'check')} did not hold{rest}.", "broken"


def findings(validation: Validation, heading: str = "h2") -> str:
    """Warnings, what did not pass, with its rows, and then every check by split.

    Args:
        validation: what the checks said.
        heading: the element of its two headings.
    """
    return (
        _warnings(validation, heading)
        + _failing(validation, heading)
        + _everything(validation, heading)
    )


def _counts(validation: Validation) -> str:
    splits = {found.split for found in validation.findings}
    facts = {
        "Checks evaluated": f"{validation.evaluated} of {validation.intended}",
        "Not passed": str(sum(not found.success for found in validation.findings)),
        "Splits": str(len(splits)),
        "Time": f"{validation.seconds:.1f} s",
    }
    cells = (f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts.items())
    return f'<dl class="counts">{"".join(cells)}</dl>'


def _warnings(validation: Validation, heading: str) -> str:
    if not validation.warnings:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in validation.warnings)
    return (
        f'<section aria-labelledby="warnings"><{heading} id="warnings">Warnings about the model'
        f"</{heading}><ul>{items}</ul></section>"
    )


def _failing(validation: Validation, heading: str) -> str:
    failing = [found for found in validation.findings if not found.success]
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
    listed = table(("Split", "Column", "Needed", "Found", "Rows, with their values"), rows)
    return (
        f'<section aria-labelledby="failing"><{heading} id="failing">What did not pass</{heading}>'
        '<p class="soft">Rows are numbered from 0, in the order of the file or of the sorted part '
        f"files.</p>{scrollable(listed, 'failing')}</section>"
    )


def _everything(validation: Validation, heading: str) -> str:
    splits = list(dict.fromkeys(found.split for found in validation.findings))
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
        listed = table(("Column", "Check", "Result", "Found"), rows)
        tone = "good" if held == len(found_here) else "bad"
        blocks.append(
            f'<details><summary id="split-{place}"><b>{escape(split)}</b>'
            f'<span class="{tone}">{held} of {many(len(found_here), "check")} passed</span>'
            f"</summary>{scrollable(listed, f'split-{place}')}</details>"
        )
    return (
        f'<section aria-labelledby="all"><{heading} id="all">All checks by split</{heading}>'
        + "".join(blocks)
        + "</section>"
    )


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
        items.append(f'<li class="soft">and {many(more, "more value")}</li>')
    return f'<ul class="rows">{"".join(items)}</ul>'


def _result(found: Finding) -> str:
    if found.success:
        return '<span class="good">passed</span>'
    word = "failed" if found.evaluated else "not evaluated"
    return f'<span class="bad">{word}</span>'
