import re
from html.parser import HTMLParser

import pytest

from infra.data.expectations import Finding, Validation
from infra.data.validation_page import validation_page

GOOD = Finding(
    split="train", column="user", rule="no null or NaN", success=True, observed="all 9 value(s)"
)
BAD = Finding(
    split="test",
    column="<script>alert(1)</script>",
    rule="id in table '<b>' (0 to 5)",
    success=False,
    observed="30 of 100 value(s) failing",
    failing_rows=(4, 7),
    failing_count=30,
    failing_values=("<img src=x>", "99"),
)
UNKNOWN = Finding(
    split="test",
    column="at",
    rule="finite",
    success=False,
    observed="not evaluated: the column is missing",
    evaluated=False,
)
VOID = {"meta", "br", "link", "img", "input"}


def page(*findings, intended=None):
    evaluated = sum(found.evaluated for found in findings)
    wanted = len(findings) if intended is None else intended
    held = all(found.success for found in findings) and evaluated == wanted > 0
    return validation_page(
        Validation(
            success=held, evaluated=evaluated, intended=wanted, findings=findings, seconds=1.25
        ),
        "Clicks & <views>",
    )


class Tree(HTMLParser):
    """Tags in order, text, and whether every tag was closed where it was opened."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.balanced = [], [], "", True
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("findings", "verdict", "sentence"),
    [
        ([GOOD], "Data passed", "Every intended check was evaluated, and every one held."),
        ([GOOD, BAD], "Data failed", "1 check did not hold."),
        ([BAD, UNKNOWN], "Data failed", "1 check did not hold; 1 more could not be evaluated."),
        ([GOOD, UNKNOWN], "Data was not fully checked", "1 check could not be evaluated"),
        ([], "Nothing was checked", "No check was intended, so nothing is known."),
    ],
)
def test_the_verdict_comes_first_and_says_why(findings, verdict, sentence):
    html = page(*findings)
    assert f"<strong>{verdict}</strong><p>{sentence}" in html
    others = {"Data passed", "Data failed", "Data was not fully checked", "Nothing was checked"}
    assert not any(f"<strong>{other}</strong>" in html for other in others - {verdict})


def test_evaluated_and_intended_are_counted():
    assert "<dt>Checks evaluated</dt><dd>1 of 2</dd>" in page(GOOD, UNKNOWN)


def test_failing_checks_stand_before_all_others_with_rows_and_values():
    html = page(GOOD, UNKNOWN, BAD)
    first = html.index("What did not pass")
    assert first < html.index("30 of 100 value(s) failing") < html.index("All checks by split")
    failing = html[first : html.index("All checks by split")]
    assert "<li>4: <code>&lt;img src=x&gt;</code></li><li>7: <code>99</code></li>" in failing
    assert "and 28 more values" in failing
    assert "all 9 value(s)" not in failing
    assert failing.index("30 of 100") < failing.index("not evaluated: the column is missing")
    assert "What did not pass" not in page(GOOD)


def test_every_check_is_listed_under_its_split():
    html = page(GOOD, BAD, UNKNOWN)
    rest = html[html.index("All checks by split") :]
    assert rest.count("<details>") == 2
    train, test = rest.split("<details>")[1:]
    assert "1 of 1 check passed" in train
    assert "0 of 2 checks passed" in test
    assert [word in test for word in ("failed", "not evaluated", "finite")] == [True] * 3


def test_what_comes_from_data_is_escaped():
    html = page(GOOD, BAD)
    tree = Tree(html)
    assert {tag for tag, _ in tree.tags}.isdisjoint({"script", "img", "b-", "views"})
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<title>Clicks &amp; &lt;views&gt;</title>" in html
    for text in ("<script>alert(1)</script>", "<img src=x>", "id in table '<b>' (0 to 5)"):
        assert text in tree.text


def test_the_page_needs_nothing_but_itself():
    html = page(GOOD, BAD, UNKNOWN)
    tree = Tree(html)
    assert not [attrs for _, attrs in tree.tags if {"src", "href", "style"} & set(attrs)]
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html


def test_the_page_is_well_formed_and_named_for_screen_readers():
    tree = Tree(page(GOOD, BAD, UNKNOWN))
    assert tree.balanced
    assert tree.open == []
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = [attrs["aria-labelledby"] for _, attrs in tree.tags if "aria-labelledby" in attrs]
    assert labels
    assert set(labels) <= set(ids)
    assert all("scope" in attrs for tag, attrs in tree.tags if tag == "th")
    assert [attrs.get("lang") for tag, attrs in tree.tags if tag == "html"] == ["en"]
