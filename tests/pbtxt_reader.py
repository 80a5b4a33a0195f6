"""A reader of protocol buffers as text, written against the format's description, not our writer.

Every field is read as a list of its values in order: without the signature a single value and a
repeated one look alike.
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
_NAMED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"'}

Message = dict[str, list[Any]]


class Word(str):
    """A value without quotes: a name of an enumeration, or true, false, inf, nan."""

    __slots__ = ()


def read(text: str) -> Message:
    """The message a text stands for; ``ValueError`` says where it is not well formed."""
    tokens = _tokens(text)
    message, at = _message(tokens, 0)
    if at != len(tokens):
        raise ValueError(f"something follows the message: {tokens[at:][:5]}")
    return message


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"no token at {at}: {text[at : at + 20]!r}")
        if token.lastgroup != "skip":
            found.append((token.lastgroup or "", token[0]))
        at = token.end()
    return found


def _message(tokens: list[tuple[str, str]], at: int) -> tuple[Message, int]:
    message: Message = {}
    while at < len(tokens) and tokens[at][1] != "}":
        kind, name = tokens[at]
        if kind != "word":
            raise ValueError(f"a field's name is wanted, found {name!r}")
        values = message.setdefault(name, [])
        if tokens[at + 1][1] == "{":
            nested, at = _message(tokens, at + 2)
            if tokens[at : at + 1] != [("mark", "}")]:
                raise ValueError(f"{name} is not closed")
            values.append(nested)
            at += 1
        elif tokens[at + 1][1] == ":":
            found, at = _values(tokens, at + 2)
            values.extend(found)
        else:
            raise ValueError(f"{name} is followed by {tokens[at + 1]}")
    return message, at


def _values(tokens: list[tuple[str, str]], at: int) -> tuple[list[Any], int]:
    if tokens[at][1] != "[":
        return [_scalar(*tokens[at])], at + 1
    found: list[Any] = []
    at += 1
    while tokens[at][1] != "]":
        if found:
            if tokens[at][1] != ",":
                raise ValueError(f"a comma is wanted, found {tokens[at]}")
            at += 1
        found.append(_scalar(*tokens[at]))
        at += 1
    return found, at + 1


def _scalar(kind: str, text: str) -> Any:
    if kind == "string":
        return _ESCAPE.sub(_unescaped, text[1:-1])
    if kind == "word":
        return Word(text)
    if kind == "number":
        return int(text) if re.fullmatch(r"-?[0-9]+", text) else float(text)
    raise ValueError(f"a value is wanted, found {text!r}")


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    if code[0] in "01234567":
        return chr(int(code, 8))
    return _NAMED[code]
