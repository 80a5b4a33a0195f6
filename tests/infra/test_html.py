"""Every page is a template: values are escaped, and Python code contains no HTML."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jinja2 import TemplateNotFound, UndefinedError
from markupsafe import Markup

from infra.pages.html import render

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "compressors", "infra")
DOCUMENT = "infra/pages/templates/document.html.jinja"
SVG = "infra/pages/pictures.py"
ELEMENTS = (
    "a abbr b blockquote body br button caption code dd details div dl dt em figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input label li link main meta "
    "nav ol option p pre script section select small span strong style sub summary sup svg table "
    "tbody td textarea tfoot th thead title tr u ul"
)
# Not the name of a group in a regular expression, (?P<title>...).
TAG = re.compile(rf"(?<!\?P)</?(?:{ELEMENTS.replace(' ', '|')})(?=[\s/>]|$)|<!doctype|<!--", re.I)


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string.

    In f-strings, ``b``, the name of an HTML element, replaces each value.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "b" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def tags(source: str) -> list[str]:
    """Return the HTML tags in the strings of a source text, as ``line: tag``."""
    return sorted(
        {f"{line}: {tag}" for line, text in strings(ast.parse(source)) for tag in TAG.findall(text)}
    )


def test_no_python_file_except_pictures_contains_an_html_tag():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    tagged = {
        path.relative_to(ROOT).as_posix(): tags(path.read_text())
        for path in files
        if tags(path.read_text())
    }
    assert list(tagged) == [SVG], tagged


@pytest.mark.parametrize(
    "source",
    [
        "x = '<p>'",
        "x = '</section>'",
        "x = f'<td class=\"number\">{y}</td>'",
        "x = f'<{heading} id=\"all\">'",
        "x = f'</{heading}>'",
        "x = ('<div '\n'class=\"a\">')",
        "x = '<!DOCTYPE html>'",
        "x = '<BR/>'",
        "def f():\n    return '<svg height=\"1\">' + y",
    ],
)
def test_tags_finds_an_html_tag_in_a_string(source):
    assert tags(source) != []


@pytest.mark.parametrize("source", ["x = '<name>.journal'", "x = 'a <= b'", "x = '(?P<title>.*)'"])
def test_tags_ignores_other_text_in_angle_brackets(source):
    assert tags(source) == []


def test_no_template_disables_escaping():
    templates = sorted(path for top in PACKAGES for path in (ROOT / top).rglob("*.jinja"))
    assert len(templates) > 10
    for path in templates:
        code = re.findall(r"\{[{%].*?[%}]\}", path.read_text(), re.DOTALL)
        assert not [part for part in code if re.search(r"\bsafe\b|\bautoescape\b", part)], path


def test_render_escapes_text_and_inserts_markup_unchanged():
    hostile = """</title><script>alert('1')</script>&"""
    escaped = "&lt;/title&gt;&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;"
    assert f"<title>{escaped}</title>" in render(DOCUMENT, title=hostile)
    assert "<title>&lt;</title>" in render(DOCUMENT, title=Markup("&lt;"))


def test_render_raises_for_a_missing_value_and_for_an_unknown_template():
    with pytest.raises(UndefinedError, match="title"):
        render(DOCUMENT)
    with pytest.raises(TemplateNotFound):
        render("infra/pages/templates/none.html.jinja")
    with pytest.raises(TemplateNotFound):
        render("../outside.html.jinja")


def test_importing_the_command_line_and_render_does_not_import_jinja2():
    code = "import sys, flows.cli.app, infra.pages.html; print('jinja2' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert process.stdout == "False\n"
