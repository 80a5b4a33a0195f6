"""Names and prose are standard technical English: words of a former dialect are errors.

Earlier versions of this project had many unusual words, such as "told" for "known" or "reported".
Names are split at underscores and capitals, so identifiers, docstrings, comments, messages and
documents follow the same rules. ``ALLOWED`` lists the uses of a word that are standard terms.
"""

import re
from pathlib import Path

import pytest
import yaml
from repository_files import ROOT, repository_files

TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".jinja", ""}
"""Only files with these suffixes are read: stored fixtures and records have other ones."""

# What to write instead of each word or phrase.
REPLACEMENTS = {
    "told": "reported, known, distinguished",
    "tell": "report, say, distinguish",
    "tells": "reports, says",
    "heard": "used, received",
    "anew": "again",
    "beside": "next to, besides: in addition to",
    "whoever": "the process that, anyone who",
    "whatever": "any, regardless of",
    "nobody": "no one, no step, no process",
    "mind": "is affected by",
    "minds": "is affected by",
    "speak of": "refer to, mention",
    "speaks of": "refers to, mentions",
    "say nothing": "are constant, have no effect",
    "says nothing": "is constant, has no effect",
    "thrown away": "discarded",
    "ask": "call, query, request, evaluate",
    "asks": "calls, queries, requests, evaluates",
    "asked": "called, queried, requested, ordered",
    "answers": "responses, predictions, outputs; returns",
    "answered": "responded, returned",
    "behind": "after, following, below",
    "sees": "receives, reads",
    "come to": "result in, amount to",
    "comes to": "results in, amounts to",
    "came to": "resulted in",
    "hand on": "pass",
    "hands on": "passes",
    "take up": "continue, occupy",
    "takes up": "continues, occupies",
}

# Uses of a word that are allowed: a line that matches one of its regular expressions is accepted.
ALLOWED = {
    "tell": (r"\.tell\(\)",),  # the position in a file
    "nobody": (r"[\"`]nobody[\"`]",),  # a Unix user
    "behind": (
        r"behind (a|the) (\w+ )?(proxy|gateway|load balancer|firewall|flag)",
        r"\"behind\"",  # a state in the output of `recpress registry triton`, as in git
    ),
    # A value of the field ``sparsity`` in audits that earlier versions of recpress stored.
    "told": (r"not told",),
}

NOT_PROSE = {
    "tests/test_language.py",  # lists the words
    "LICENSE",
    "constraints.txt",
}


def list_text_files() -> list[Path]:
    """List the files of the repository whose words are checked."""
    return [
        path
        for path in repository_files()
        if path.suffix in TEXT_SUFFIXES and path.relative_to(ROOT).as_posix() not in NOT_PROSE
    ]


def split_words(line: str) -> str:
    """Return the words of a line in lower case, separated by spaces.

    Names are split at underscores and capitals. Digits and punctuation are removed.
    """
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", line)).lower()


def find_forbidden_words(line: str) -> list[str]:
    """Return the words and phrases of ``REPLACEMENTS`` in a line, except allowed uses."""
    words = f" {split_words(line)} "
    return [
        word
        for word in REPLACEMENTS
        if f" {word} " in words
        and not any(re.search(pattern, line) for pattern in ALLOWED.get(word, ()))
    ]


def test_no_line_uses_a_word_of_the_former_dialect() -> None:
    violations = [
        f"{path.relative_to(ROOT)}:{number}: {word!r}: write {REPLACEMENTS[word]}"
        for path in list_text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in find_forbidden_words(line)
    ]
    assert violations == [], "\n" + "\n".join(violations)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("def who_is_told(self):", ["told"]),
        ("class AskedTwice:", ["asked"]),
        ("# the server is behind a proxy", []),
        ("# the layer behind it", ["behind"]),
        ("channels that say nothing", ["say nothing"]),
        ("task = basket", []),
    ],
)
def test_words_are_found_in_names_and_prose_but_not_inside_others(
    line: str, expected: list[str]
) -> None:
    assert find_forbidden_words(line) == expected


@pytest.mark.parametrize(
    ("subject", "is_accepted"),
    [
        ("tables: add per-group scales to int4", True),
        ("quantize, prune: name variables by their content", True),
        ("docs and tests: describe the commands", True),
        ("tests/flows: move a fixture", True),
        ("Merge branch 'x'", True),
        ("wip", False),
        ("tables: Add scales", False),
        ("tables: add scales.", False),
        ("tables: " + "x" * 64, True),  # 72 characters, the limit
        ("tables: " + "x" * 65, False),
    ],
)
def test_commit_message_hook_accepts_an_area_and_a_short_summary(
    subject: str, is_accepted: bool
) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (hook,) = (item for item in hooks if item["id"] == "commit-subject")
    assert (hook["language"], hook["stages"]) == ("pygrep", ["commit-msg"])
    assert hook["args"] == ["--multiline", "--negate"]
    # pre-commit's pygrep searches the file of the message. With --multiline, it matches the pattern
    # against the whole file, with these two flags; with --negate, the hook passes if it matches.
    pattern = re.compile(hook["entry"], re.MULTILINE | re.DOTALL)
    message = f"{subject}\n\nThe body. It has sentences.\n"
    assert (pattern.search(message) is not None) == is_accepted
