"""Text from outside that cannot control what shows it: a terminal, a log, a page.

Names in a bundle, tags of a registry, file names, arguments and variables of the environment may
contain anything. Every place that shows them uses these functions; ``flows/cli/console.py``
applies them to all that a command prints.
"""

import re

LONGEST_SENTENCE = 900
"""Characters of one sentence of a refusal: 20 of them fit on a page."""

_CONTROL = re.compile(
    "["
    "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f"  # C0 but tabs and line ends, DEL, C1
    "\\u00ad\\u061c\\u180e"  # soft hyphen, marks of direction
    "\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff"  # zero width, separators, direction
    "\\ufff9-\\ufffb\\ud800-\\udfff\\U000e0000-\\U000e007f"  # annotations, surrogates, tags
    "]"
)


def printable(text: str) -> str:
    """Text that cannot control a terminal, reorder what is shown on it, or hide in it.

    Control characters other than line ends and tabs, characters without width, and those that
    change the direction of writing are written as JSON escapes, so JSON stays the same JSON.
    """
    return _CONTROL.sub(_escaped, text)


def one_line(text: str) -> str:
    """The same for text that must stay on one line: line ends and tabs are escaped too."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def bounded(sentence: str) -> str:
    """A sentence that may quote anything, cut to ``LONGEST_SENTENCE`` characters."""
    if len(sentence) <= LONGEST_SENTENCE:
        return sentence
    return f"{sentence[: LONGEST_SENTENCE - 3]}..."


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
