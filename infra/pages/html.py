"""Render Jinja2 templates as HTML pages that need no network and no script.

All HTML is in the templates of this folder and of ``tasks/report``, never in Python code. Values
from a model or its data are passed to templates as plain text, and every value is escaped.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from infra.printable import printable

if TYPE_CHECKING:
    from jinja2 import Environment

ROOT = Path(__file__).parents[2]
"""The root folder of the repository, which contains the packages ``infra`` and ``tasks``."""


def render(template: str, **values: object) -> str:
    """Render a template; control characters in the result are escaped.

    Args:
        template: its path below ``ROOT``, such as ``tasks/report/templates/page.html.jinja``.
        values: the template's variables, by name. All are escaped except ``markupsafe.Markup``;
            use that class only for the charts of ``infra/pages/pictures.py``.

    Raises:
        jinja2.TemplateNotFound: the file does not exist.
        jinja2.UndefinedError: the template uses a variable that is not in ``values``.
    """
    return printable(_create_environment().get_template(template).render(values))


def format_count(count: int, noun: str) -> str:
    """Format a count and its noun, in the plural unless it is one: ``1 check``, ``2 checks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@functools.cache
def _create_environment() -> "Environment":
    # Imported here because commands that render no page import this module too.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
