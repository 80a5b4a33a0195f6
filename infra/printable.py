"""Escape untrusted text so that it cannot control a terminal, a log or a page.

Names in a bundle, tags in a registry, file names, arguments and environment variables may contain
any character. All code that shows such text uses these functions; ``flows/cli/console.py`` applies
them to everything that a command prints.
"""

import re

MAX_SENTENCE_CHARACTERS = 900
"""Most characters of one sentence.

The limit is for sentences, not for messages, because an error message may contain 20 of them.
"""

_CONTROL = re.compile(
    "["
    "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f"  # C0 except tabs and line ends, DEL, C1
    "\\u00ad\\u061c\\u180e"  # soft hyphen, Arabic letter mark, Mongolian vowel separator
    "\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff"  # zero width, separators, direction
    "\\ufff9-\\ufffb\\ud800-\\udfff\\U000e0000-\\U000e007f"  # annotations, surrogates, tags
    "]"
)


def printable(text: str) -> str:
    """Escape characters that can control a terminal, reorder its output, or hide text.

    These are control characters except line ends and tabs, characters without width, and those
    that change the writing direction. They become JSON escapes, so JSON text keeps its meaning.
    """
    return _CONTROL.sub(_escape, text)


def one_line(text: str) -> str:
    """Escape text as ``printable`` does, including line ends and tabs."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def truncate_sentence(sentence: str) -> str:
    """Truncate a sentence that may quote untrusted text to ``MAX_SENTENCE_CHARACTERS``."""
    if len(sentence) <= MAX_SENTENCE_CHARACTERS:
        return sentence
    return f"{sentence[: MAX_SENTENCE_CHARACTERS - 3]}..."


def _escape(match: re.Match[str]) -> str:
    r"""Return the JSON escape of a character: ``\uXXXX`` for each of its UTF-16 units."""
    encoded = match[0].encode("utf-16-be", "surrogatepass")  # two bytes per unit
    return "".join(f"\\u{encoded[k]:02x}{encoded[k + 1]:02x}" for k in range(0, len(encoded), 2))
