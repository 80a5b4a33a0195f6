"""The HTML page of a validation: verdict, counts, failing checks, escaping, accessibility."""

import re
from html.parser import HTMLParser

import pytest

from infra.data.expectations import Finding, Validation
from infra.data.validation_page import validation_page

PASSED = Finding(
    split="train", column="user", rule="no null or NaN", success=True, observed="all 9 value(s)"
)
FAILED = Finding(
    split="test",
    column="<script>alert(1)</script>",
    rule="id in table '<b>' (0 to 5)",
    success=False,
    observed="30 of 100 value(s) failing",
    failing_rows=(4, 7),
    failing_count=30,
    failing_values=("<img src=x>", "99"),
)
NOT_EVALUATED = Finding(
    split="test",
    column="at",
    rule="finite",
    success=False,
    observed="not evaluated: the column is missing",
    evaluated=False,
)
VOID_TAGS = {"meta", "br", "link", "img", "input"}


def page_of(*findings, intended=None):
    """Render the page of a validation; ``intended`` is the number of planned checks.

    By default it is the number of findings, each of which is the result of one check.
    """
    evaluated = sum(finding.evaluated for finding in findings)
    planned = len(findings) if intended is None else intended
    all_passed = all(finding.success for finding in findings) and evaluated == planned > 0
    return validation_page(
        Validation(
            success=all_passed,
            evaluated=evaluated,
            intended=planned,
            findings=findings,
            seconds=1.25,
        ),
        "Clicks & <views>",
    )


class Tree(HTMLParser):
    """Parses a page into its tags in order and its text, and checks that tags are balanced."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.balanced = [], [], "", True
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("findings", "verdict", "sentence"),
    [
        ([PASSED], "Data passed", "Every planned check was evaluated and passed."),
        ([PASSED, FAILED], "Data failed", "1 check failed."),
        (
            [FAILED, NOT_EVALUATED],
            "Data failed",
            "1 check failed; 1 more could not be evaluated.",
        ),
        ([PASSED, NOT_EVALUATED], "Data was not fully checked", "1 check could not be evaluated"),
        ([], "Nothing was checked", "No split was given, so no check was run."),
    ],
)
def test_page_shows_the_verdict_with_its_reason(findings, verdict, sentence):
    html = page_of(*findings)
    assert f"<strong>{verdict}</strong><p>{sentence}" in html
    others = {"Data passed", "Data failed", "Data was not fully checked", "Nothing was checked"}
    assert not any(f"<strong>{other}</strong>" in html for other in others - {verdict})


def test_page_shows_the_numbers_of_evaluated_and_planned_checks():
    assert "<dt>Checks evaluated</dt><dd>1 of 2</dd>" in page_of(PASSED, NOT_EVALUATED)


def test_page_shows_failing_checks_first_with_rows_and_values():
    html = page_of(PASSED, NOT_EVALUATED, FAILED)
    first = html.index("What did not pass")
    assert first < html.index("30 of 100 value(s) failing") < html.index("All checks by split")
    failing = html[first : html.index("All checks by split")]
    assert "<li>4: <code>&lt;img src=x&gt;</code></li><li>7: <code>99</code></li>" in failing
    assert "and 28 more values" in failing
    assert "all 9 value(s)" not in failing
    assert failing.index("30 of 100") < failing.index("not evaluated: the column is missing")
    assert "What did not pass" not in page_of(PASSED)


def test_page_lists_every_check_under_its_split():
    html = page_of(PASSED, FAILED, NOT_EVALUATED)
    section = html[html.index("All checks by split") :]
    assert section.count("<details>") == 2
    train, test = section.split("<details>")[1:]
    assert "1 of 1 check passed" in train
    assert "0 of 2 checks passed" in test
    assert [word in test for word in ("failed", "not evaluated", "finite")] == [True] * 3


def test_page_escapes_text_from_the_data():
    html = page_of(PASSED, FAILED)
    tree = Tree(html)
    assert {tag for tag, _ in tree.tags}.isdisjoint({"script", "img", "views"})
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<title>Clicks &amp; &lt;views&gt;</title>" in html
    for text in ("<script>alert(1)</script>", "<img src=x>", "id in table '<b>' (0 to 5)"):
        assert text in tree.text


def test_page_loads_no_other_file():
    html = page_of(PASSED, FAILED, NOT_EVALUATED)
    tree = Tree(html)
    assert not [attrs for _, attrs in tree.tags if {"src", "href", "style"} & set(attrs)]
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html


def test_page_is_well_formed_and_has_names_for_screen_readers():
    tree = Tree(page_of(PASSED, FAILED, NOT_EVALUATED))
    assert tree.balanced
    assert tree.open == []
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = [attrs["aria-labelledby"] for _, attrs in tree.tags if "aria-labelledby" in attrs]
    assert labels
    assert set(labels) <= set(ids)
    assert all("scope" in attrs for tag, attrs in tree.tags if tag == "th")
    assert [attrs.get("lang") for tag, attrs in tree.tags if tag == "html"] == ["en"]
