"""A parser of protocol buffers in text format, written from the description of the format.

It does not share code with the writer that it tests. Every field is a list of values, since a
single and a repeated field cannot be distinguished without the message definition.
"""

import re
from typing import Any

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r\n]+|\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<number>-?(?:inf|[0-9][0-9.]*(?:e[+-]?[0-9]+)?))
    |(?P<mark>[:{}\[\],])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\([0-7]{1,3}|.)", re.DOTALL)
_NAMED_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"'}

Message = dict[str, list[Any]]


class Word(str):
    """A value without quotes: a name of an enumeration, or true, false, inf, nan."""

    __slots__ = ()


def parse_message(text: str) -> Message:
    """Parse a message; raise ``ValueError`` with the position if the text is malformed."""
    tokens = _tokens(text)
    message, position = _message(tokens, 0)
    if position != len(tokens):
        raise ValueError(f"expected the end of the text, got {tokens[position:][:5]}")
    return message


def _tokens(text: str) -> list[tuple[str, str]]:
    """Return kind (the group in ``_TOKEN``) and text of each token, without spaces and comments."""
    tokens, position = [], 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise ValueError(
                f"expected a token at {position}, got {text[position : position + 20]!r}"
            )
        if token.lastgroup != "skip":
            tokens.append((token.lastgroup or "", token[0]))
        position = token.end()
    return tokens


def _message(tokens: list[tuple[str, str]], position: int) -> tuple[Message, int]:
    """Parse fields from ``position`` to a closing brace or the end; also return where they end."""
    message: Message = {}
    while position < len(tokens) and tokens[position][1] != "}":
        kind, name = tokens[position]
        if kind != "word":
            raise ValueError(f"expected the name of a field, got {name!r}")
        values = message.setdefault(name, [])
        if tokens[position + 1][1] == "{":
            nested, position = _message(tokens, position + 2)
            if tokens[position : position + 1] != [("mark", "}")]:
                raise ValueError(f"expected a closing brace of {name}")
            values.append(nested)
            position += 1
        elif tokens[position + 1][1] == ":":
            field_values, position = _values(tokens, position + 2)
            values.extend(field_values)
        else:
            raise ValueError(f"expected a brace or colon after {name}, got {tokens[position + 1]}")
    return message, position


def _values(tokens: list[tuple[str, str]], position: int) -> tuple[list[Any], int]:
    """Parse one value, or a list in brackets; also return the position after it."""
    if tokens[position][1] != "[":
        return [_scalar(*tokens[position])], position + 1
    values: list[Any] = []
    position += 1
    while tokens[position][1] != "]":
        if values:
            if tokens[position][1] != ",":
                raise ValueError(f"expected a comma, got {tokens[position]}")
            position += 1
        values.append(_scalar(*tokens[position]))
        position += 1
    return values, position + 1


def _scalar(kind: str, text: str) -> Any:
    """Parse the token of a string, a word or a number."""
    if kind == "string":
        return _ESCAPE.sub(_unescape, text[1:-1])
    if kind == "word":
        return Word(text)
    if kind == "number":
        return int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
    raise ValueError(f"expected a value, got {text!r}")


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "01234567":
        return chr(int(code, 8))
    return _NAMED_ESCAPES[code]
