"""Change valid inputs of a parser and count what comes out: a result or a refusal of ours.

Inputs are drawn with a fixed seed: two thirds are changed values or bytes of valid inputs, one
third is drawn by hypothesis, which puts arbitrary JSON values or bytes into valid inputs.
"""

import copy
import json
import random
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

SLOW_SECONDS = 5.0
LONGEST_MESSAGE = 20_000
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.1, -0.0, 1e308, -1e308, 5e-324, 2**63, 2**64, -(2**63), 10**30,
    10**400, "", " ", "\0", "x" * 100_000, "\ud800", "\u202e", "../..", "/etc/passwd", "[/red]",
    "{0}", "%s", "${x}", "'; drop", "nan", "inf", "1e999", "\uff11\uff12", "=1+1", "\n", "\x1b[31m",
    "cuda:0", "*", "**", "[", "[!", "(", "a*" * 3000, [], {}, [[]], [None], {"a": {}}, {"": 1},
    {"\0": 1}, [1] * 1000,
)  # fmt: skip
PIECES = (
    b'"', b"{", b"[", b"\xff", b"\0", b"NaN", b"1e999", b"-", b"\\u", b"9" * 5000, b"]}", b"\n",
    b"[" * 3000, b"\xef\xbb\xbf",
)  # fmt: skip
NAMES = ("zzz", "kind", "__class__", "tables", "\0", "x" * 2000, "name")


def run(parser: str, count: int, seed: int) -> dict[str, Any]:
    """Parse ``count`` changed inputs.

    Returns:
        ``outcomes`` with their numbers, and ``failures``: one of each kind, with its input.
    """
    from parsers import PARSERS

    with tempfile.TemporaryDirectory() as scratch:
        under_test = PARSERS[parser](Path(scratch))
        outcomes: Counter[str] = Counter()
        failures: dict[str, str] = {}

        def attempt(body: bytes) -> None:
            outcome, detail = _attempt(under_test.parse, body)
            outcomes[outcome] += 1
            if detail:
                failures.setdefault(detail.splitlines()[0], f"{detail}\ninput: {body[:600]!r}")

        for seed_input in under_test.seeds:
            outcome, detail = _attempt(under_test.parse, seed_input)
            if outcome != "parsed":
                raise AssertionError(f"a valid input of {parser!r} is {outcome}: {detail}")
        drawn = count // 3
        draw = random.Random(f"{parser} {seed}")
        for number in range(count - drawn):
            base = draw.choice(under_test.seeds)
            if under_test.is_json and number % 3:
                attempt(_changed_document(draw, base))
            else:
                attempt(_changed_bytes(draw, base, draw.randint(1, 4)))
        _by_hypothesis(under_test.seeds, under_test.is_json, drawn, seed, attempt)
    return {"outcomes": dict(outcomes), "failures": list(failures.values())}


def run_all(count: int, seed: int) -> dict[str, dict[str, Any]]:
    """The same for every parser, in one process."""
    from parsers import PARSERS

    return {parser: run(parser, count, seed) for parser in PARSERS}


def _attempt(parse: Any, body: bytes) -> tuple[str, str]:
    """How parsing ended; for a failure also what was wrong, first line first."""
    import typer
    from pydantic import ValidationError

    from compressors.errors.compression import CompressionError
    from infra.errors import InfraError, Refused

    began = time.monotonic()
    try:
        parse(body)
        outcome = "parsed"
    except (Refused, InfraError, CompressionError, typer.BadParameter, typer.Exit) as fault:
        outcome = "refused"
        if len(str(fault)) > LONGEST_MESSAGE:
            return "failed", f"message of {len(str(fault))} characters: {str(fault)[:200]}"
    except ValidationError as fault:
        from flows.order_faults import sentences

        outcome = "refused"
        if not sentences(fault):
            return "failed", f"no sentence for {fault}"
    except BaseException as fault:
        frame = traceback.extract_tb(fault.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return "failed", f"{type(fault).__name__} at {where}\n{traceback.format_exc()[-1500:]}"
    if time.monotonic() - began > SLOW_SECONDS:
        return "failed", f"took {time.monotonic() - began:.0f} s"
    return outcome, ""


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    found = [at] if at else []
    for key, held in items:
        found += _paths(held, (*at, key))
    return found


def _get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _changed_document(draw: random.Random, base: bytes) -> bytes:
    document = json.loads(base)
    for _ in range(draw.randint(1, 3)):
        paths = _paths(document)
        if not paths:
            break
        path = draw.choice(paths)
        parent, key = _get(document, path[:-1]), path[-1]
        action = draw.randrange(6)
        if action < 2:
            parent[key] = copy.deepcopy(draw.choice(ODD))
        elif action == 2:
            del parent[key]
        elif action == 3 and isinstance(parent, dict):
            parent[draw.choice(NAMES)] = copy.deepcopy(draw.choice(ODD))
        elif action == 4:
            parent[key] = copy.deepcopy(_get(document, draw.choice(paths)))
        else:
            parent[key] = _nudged(draw, parent[key])
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _nudged(draw: random.Random, value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        factor = draw.choice([-1, 0, 10**6, 0.5, 10**15])
        is_huge = isinstance(value, int) and abs(value) > 10**300  # beyond what a float can be
        return value // 2 if is_huge and factor == 0.5 else value * factor
    if isinstance(value, str) and value:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice(["\0", "\ud800", "*", "[", "é", ""]) + value[at + 1 :]
    return [value]


def _changed_bytes(draw: random.Random, base: bytes, count: int) -> bytes:
    body = bytearray(base)
    for _ in range(count):
        if not body:
            break
        at = draw.randrange(len(body))
        action = draw.randrange(5)
        if action == 0:
            body[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            del body[at : at + draw.randint(1, 20)]
        elif action == 2:
            body[at:at] = draw.choice(PIECES)
        elif action == 3:
            del body[at:]
        else:
            other = draw.randrange(len(body))
            body[at:at] = body[other : other + 50]
    return bytes(body)


def _by_hypothesis(
    seeds: tuple[bytes, ...], is_json: bool, count: int, seed: int, attempt: Any
) -> None:
    import hypothesis
    from hypothesis import strategies as st

    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
        max_leaves=6,
    )
    places = st.integers(0, 2**20)
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(st.sampled_from(seeds), places, values, st.binary(max_size=40))
    def draw(base: bytes, place: int, value: Any, piece: bytes) -> None:
        if not is_json or place % 5 == 0:
            at = place % (len(base) + 1)
            attempt(base[:at] + piece + base[at + len(piece) * (place % 2) :])
            return
        document = json.loads(base)
        path = _paths(document)[place % len(_paths(document))]
        _get(document, path[:-1])[path[-1]] = value
        attempt(json.dumps(document).encode("utf-8", "surrogatepass"))

    draw()
