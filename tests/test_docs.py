"""The documentation: links point to existing files and headings; pages cover every setting."""

import re
import unicodedata
from pathlib import Path

import pytest
from models import METHODS
from pydantic import TypeAdapter

from compressors.core.registries import AnyStep
from compressors.distill.training.settings import Training

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
METHOD_PAGES = sorted((DOCS / "methods").glob("*.md"))
STEP = TypeAdapter(AnyStep)


def without_code(text: str) -> str:
    """Remove fenced code blocks from a page: links and headings in them are not rendered."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for the headings of a page.

    Letters, digits, ``_`` and ``-`` are kept, and spaces become ``-``. The anchor of a repeated
    heading has a number at its end.
    """
    names: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE):
        rendered = LINK.sub(lambda link: link[0].partition("]")[0].lstrip("["), heading)
        name = "".join(
            letter
            for letter in rendered.strip().lower()
            if letter in "-_ " or unicodedata.category(letter)[0] in "LN"
        )
        names.append(name.replace(" ", "-"))
    return {
        name if names[:index].count(name) == 0 else f"{name}-{names[:index].count(name)}"
        for index, name in enumerate(names)
    }


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    broken = []
    for target in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def list_rows(text: str, header: str) -> list[str]:
    """Return the rows of the table with this header, or an empty list if there is none."""
    _, separator, after = text.partition(f"{header}\n")
    if not separator:
        return []
    return [row for row in after.partition("\n\n")[0].splitlines() if not row.startswith("|---")]


def setting_rows() -> list[str]:
    """Return the rows of the settings tables of all method pages."""
    header = "| step | settings (default) |"
    return [row for page in METHOD_PAGES for row in list_rows(page.read_text(), header)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_points_to_an_existing_file_and_heading(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_returns_links_to_missing_files_and_headings(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `name`, twice\n\n## Same\n\n## Same\n\n```\n[code](absent.md)\n```\n"
        "[a](#a-name-twice) [b](#same-1) [c](page.md#same) [d](https://example.org/absent)\n"
        "[e](#same-2) [f](absent.md) [g](page.md#code)\n"
    )
    assert broken_links(page) == ["#same-2", "absent.md", "page.md#code"]


def test_methods_page_lists_every_method_once_with_its_page() -> None:
    index = (DOCS / "methods.md").read_text()
    listed = re.findall(r"^\| \[`(\w+)`\]\(methods/(\w+\.md)\)", index, re.MULTILINE)
    assert sorted(kind for kind, _ in listed) == sorted(method().kind for method in METHODS)
    for kind, page in listed:
        title = (DOCS / "methods" / page).read_text().partition("\n")[0]
        assert f"`{kind}`" in title, (kind, page)


def test_every_setting_of_every_method_is_on_its_page() -> None:
    rows = setting_rows()
    for name, fields in (
        *((method().kind, set(method.model_fields) - {"kind"}) for method in METHODS),
        ("training", set(Training.model_fields)),
    ):
        matching = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert len(matching) == 1, name
        assert fields <= set(re.findall(r"`(\w+)`", matching[0])), name


def test_json_blocks_of_method_pages_are_valid_steps_of_the_page() -> None:
    for page in METHOD_PAGES:
        blocks = re.findall(r"^```json\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        lines = [line for block in blocks for line in block.splitlines()]
        kinds = {STEP.validate_json(line).kind for line in lines}
        title = page.read_text().partition("\n")[0]
        title_kinds = set(re.findall(r"`(\w+)`", title))
        assert not title_kinds or kinds & title_kinds, page
        assert lines, page
