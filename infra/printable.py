"""Escape untrusted text so that it cannot control a terminal, a log or a page.

Names in a bundle, tags of a registry, file names, arguments and variables of the environment may
contain anything. Every place that shows them uses these functions; ``flows/cli/console.py``
applies them to all that a command prints.
"""

import re

LONGEST_SENTENCE = 900
"""Characters of one sentence of a refusal: 20 of them fit on a page."""

_CONTROL = re.compile(
    "["
    "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f"  # C0 except tabs and line ends, DEL, C1
    "\\u00ad\\u061c\\u180e"  # soft hyphen, marks of direction
    "\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff"  # zero width, separators, direction
    "\\ufff9-\\ufffb\\ud800-\\udfff\\U000e0000-\\U000e007f"  # annotations, surrogates, tags
    "]"
)


def printable(text: str) -> str:
    """Escape text so that it cannot control a terminal, reorder its output, or be invisible.

    Control characters other than line ends and tabs, characters without width, and those that
    change the direction of writing are written as JSON escapes, so JSON text keeps its meaning.
    """
    return _CONTROL.sub(_escaped, text)


def one_line(text: str) -> str:
    """Escape text as ``printable`` does, and line ends and tabs too."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def bounded(sentence: str) -> str:
    """Cut a sentence that may quote untrusted text to ``LONGEST_SENTENCE`` characters."""
    if len(sentence) <= LONGEST_SENTENCE:
        return sentence
    return f"{sentence[: LONGEST_SENTENCE - 3]}..."


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
