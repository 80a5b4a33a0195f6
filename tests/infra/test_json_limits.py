"""Size limits of untrusted JSON: text that exceeds them is refused with little memory."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from error_codes import TextMatching, raises_code, raises_value_error

from compressors.contracts import PlanLine, Reason
from infra.bundle import json_limits
from infra.bundle.json_limits import MAX_JSON_BYTES, MAX_JSON_VALUES, check_limits, measure
from infra.bundle.json_reader import decode
from infra.bundle.shards import stored_tensors
from infra.errors import BundleRefused

MAX_MEMORY = 300 * 2**20  # in addition to the memory before reading

# Items of a long list in a JSON text, with the comma after each.
ITEMS = {
    "empty lists": b"[],",
    "empty objects": b"{},",
    "empty texts": b'"",',
    "small numbers": b"1,",
    "floats": b"1e9,",
    "nested lists": b"[[[[[[[[]]]]]]]],",
    "lists of one": b"[1],",
    "objects of one": b'{"a":1},',
    "texts that are not ASCII": '"é😀",'.encode(),
    "escaped texts": b'"\\"\\\\",',
    "numbers of 4000 digits": b"9" * 4000 + b",",
}

# Reads each file in a fork with limited memory, and prints a line that begins with the result.
READ_WITH_LIMIT = """
import os, resource, sys
from pathlib import Path
from infra.bundle.json_reader import read_json
from infra.bundle.shards import stored_tensors
from infra.errors import BundleRefused
for path in map(Path, sys.argv[2:]):
    if os.fork() == 0:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + int(sys.argv[1]),) * 2)
        try:
            read_json(path) if path.suffix == ".json" else stored_tensors(path)
        except BundleRefused as fault:
            print("refused", str(fault)[-80:].encode(), flush=True)
        except BaseException as fault:
            print("failed", repr(fault)[:80].encode(), flush=True)
        else:
            print("read", flush=True)
        os._exit(0)
    os.wait()
"""


def read_in_children(paths: list[Path]) -> list[str]:
    """Read each file in a process with limited memory; return the results of the processes."""
    command = [sys.executable, "-c", READ_WITH_LIMIT, str(MAX_MEMORY), *map(str, paths)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    return [line.partition(" ")[0] for line in completed.stdout.splitlines()]


def test_json_beyond_a_limit_is_refused_within_300_mib(tmp_path):
    paths = []
    for index, item in enumerate(ITEMS.values()):
        # Files of MAX_JSON_BYTES exceed other limits; one larger file exceeds this limit.
        for size in (MAX_JSON_BYTES, 64 << 20) if index == 0 else (MAX_JSON_BYTES,):
            paths.append(tmp_path / f"{index}-{size}.json")
            paths[-1].write_bytes(b'{"a":[' + item * ((size - 10) // len(item)) + b"1]}")
    assert read_in_children(paths) == ["refused"] * len(paths)


# Indices of ``texts`` in the test below. By default: the two texts that take the most memory, and
# the longest one.
SELECTIONS = [(1, 3, 6), pytest.param(range(7), marks=pytest.mark.nightly)]


@pytest.mark.parametrize("selected", SELECTIONS, ids=["some", "all"])
@pytest.mark.slow
def test_largest_allowed_json_is_read_within_300_mib(tmp_path, selected):
    names = ",".join(f'"k{index}":{{}}' for index in range(MAX_JSON_VALUES // 3 - 10))
    texts = [
        '{"a":[' + "[]," * (MAX_JSON_VALUES // 2 - 10) + "1]}",
        '{"a":[' + '{"a":{}},' * (MAX_JSON_VALUES // 4 - 10) + "1]}",
        '{"a":[' + '"",' * (MAX_JSON_VALUES - 10) + "1]}",
        "{" + names + "}",
        '{"a":[' + ("9" * 390 + ",") * ((MAX_JSON_BYTES - 10) // 391) + "1]}",
        '{"a":"' + "x" * (MAX_JSON_BYTES - 10) + '"}',
        '{"a":"\U0001f600' + "x" * (MAX_JSON_BYTES - 20) + '"}',
    ]
    paths = [tmp_path / f"{index}.json" for index in selected]
    for index, path in zip(selected, paths, strict=True):
        path.write_text(texts[index], encoding="utf-8")
    assert read_in_children(paths) == ["read"] * len(paths)


def write_safetensors(path: Path, header: bytes, body: bytes = b"") -> Path:
    """Write a safetensors file with any header; return the path."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


@pytest.mark.slow
def test_safetensors_header_of_100000_tensors_is_read(tmp_path):
    entry = {"dtype": "F32", "shape": [0, 16], "data_offsets": [0, 0]}
    header = {f"model.features.tables.{n:06d}.weight": entry for n in range(100_000)}
    path = write_safetensors(tmp_path / "model.safetensors", json.dumps(header).encode())
    assert len(stored_tensors(path)) == 100_000


def test_safetensors_header_beyond_a_limit_is_refused_within_300_mib(tmp_path):
    headers = {
        "text": b'{"__metadata__":{"a":"' + b"x" * 60_000_000 + b'"}}',
        "metadata": b'{"__metadata__":{' + b'"a":"",' * 3_000_000 + b'"b":""}}',
        "lists": b'{"a":[' + b"[]," * 8_000_000 + b"1]}",
        "shape": b'{"a":{"dtype":"U8","shape":[' + b"1," * 8_000_000 + b'1],"data_offsets":[0,1]}}',
        "number": b'{"a":{"dtype":"U8","shape":[' + b"9" * 10**7 + b'],"data_offsets":[0,1]}}',
        "depth": b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    }
    paths = [
        write_safetensors(tmp_path / f"{name}.safetensors", header, b"\0")
        for name, header in headers.items()
    ]
    assert read_in_children(paths) == ["refused"] * len(paths)


def test_model_json_of_10000_tables_is_far_below_the_limits():
    module = {"kind": "table", "format": "rowwise_int8", "settings": {"rows": 10**6, "dim": 64}}
    format_reason = Reason(
        "other_format_smaller", format="rowwise_int8", bytes=10**9, step_bytes=10**9
    )
    line = PlanLine(
        module="features.tables.1000",
        role="table",
        format="product_codes",
        bytes_before=10**10,
        bytes_after=10**9,
        steps=("dimensions", "product_codes"),
        reasons=(Reason("selected", step="product_codes"), format_reason),
    )
    document = {
        "modules": {f"features.tables.{n}": module for n in range(10_000)},
        "plan": [json.loads(line.model_dump_json())] * 10_000,
    }
    raw = json.dumps(document).encode()
    assert len(raw) < MAX_JSON_BYTES / 2
    assert measure(raw).values < MAX_JSON_VALUES / 2


@pytest.mark.parametrize(
    ("text", "values", "depth", "longest_number"),
    [
        # ``values``, an upper bound, is one more than the number of "[", "{", "," and ":".
        ('{"a,[": "x:{,"}', 3, 1, 0),
        (r'{"a\"[,": [1, -2.5e+10]}', 5, 2, 8),
        (r'["\\", "[[["]', 3, 1, 0),
        (r'["\\\"[[", [[]]]', 5, 3, 0),
        ("[123, 45678]", 3, 1, 5),
        ("7", 1, 0, 1),
        ("", 1, 0, 0),
    ],
)
def test_measure_ignores_text_in_strings(text, values, depth, longest_number):
    assert measure(text.encode()) == (values, depth, longest_number)


def test_measure_does_not_depend_on_where_a_block_ends(monkeypatch):
    document = {"a" * 7: [1.25, 'x,[\\"', [[{}], -123456789]], "ü": {"b": [None, True]}}
    raw = json.dumps(document, ensure_ascii=False).encode()
    whole = measure(raw)
    for block in range(1, 40):
        monkeypatch.setattr(json_limits, "_BLOCK", block)
        assert measure(raw) == whole


@pytest.mark.parametrize("raw", [b'"' * 101, b"]" * 50, b"\\" * 77, b'\\"' * 10, bytes(range(256))])
def test_measure_accepts_any_bytes(raw):
    check_limits(raw)
    with pytest.raises(BundleRefused):
        decode(raw, Path("model.json"))


def test_number_of_400_characters_is_read_and_of_401_is_refused():
    assert decode(b'{"a": ' + b"9" * 400 + b"}", Path("x"))["a"] == int("9" * 400)
    with raises_code(
        BundleRefused, "json_unusable", problem=TextMatching("more than 400 characters")
    ):
        decode(b'{"a": ' + b"9" * 401 + b"}", Path("x"))


@pytest.mark.parametrize("opening", ["[", '{"x":'])
def test_64_levels_are_accepted_and_65_are_refused(opening):
    closing = {"[": "]", '{"x":': "}"}[opening]
    check_limits(f"{opening * 64}0{closing * 64}".encode())
    with raises_value_error("json_too_deep", most_levels=64):
        check_limits(f"{opening * 65}0{closing * 65}".encode())
