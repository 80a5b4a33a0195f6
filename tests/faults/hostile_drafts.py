"""Hostile drafts for ``recpress bundle pack``: each case changes a valid draft in one way.

A draft is the folder that a user writes: ``model.json``, weights and parquet files. A vocabulary is
a file or folder that maps raw values to ids, and a tie says which parameters share a tensor.
A ``Change`` is a function that changes the draft in a folder. The functions below return changes;
the docstring of each says what the returned function does. ``CASES`` lists all cases.
"""

import io
import json
import os
import pickle  # noqa: TID251 (written, never read)
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Change = Callable[[Path], None]

SECRET = "a-secret-outside-of-the-draft"
SECRET_FILE = "secret.txt"
RAN = "code-ran"
"""Name of a file next to the draft that a payload creates if it is executed."""


class _Payload:
    """An object whose pickle creates the file ``RAN`` when it is loaded."""

    def __init__(self, outside: Path) -> None:
        self.outside = outside

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.outside / RAN}",)


def document(draft: Path) -> dict[str, Any]:
    """Return the ``model.json`` of a draft."""
    content: dict[str, Any] = json.loads((draft / "model.json").read_text())
    return content


def write(name: str, body: bytes) -> Change:
    """Write a file of the draft."""
    return lambda draft: (draft / name).write_bytes(body) and None


def write_later(name: str, body: Callable[[], bytes]) -> Change:
    """Write a file of the draft whose large body is created only when its case runs."""
    return lambda draft: (draft / name).write_bytes(body()) and None


def edit(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the decoded ``model.json``."""

    def apply(draft: Path) -> None:
        content = document(draft)
        change(content)
        (draft / "model.json").write_text(json.dumps(content))

    return apply


def write_pickle(name: str, protocol: int) -> Change:
    """Write a pickle of ``_Payload``."""

    def apply(draft: Path) -> None:
        body = pickle.dumps(_Payload(draft.parent), protocol)
        (draft / name).write_bytes(body)

    return apply


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> Change:
    """Write a weights file with any header, body and stated length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write(
        "model.safetensors",
        struct.pack("<Q", len(text) if length is None else length) + text + body,
    )


def tensor(shape: Any, offsets: list[int], dtype: str = "F32", size: int = 16) -> Change:
    """Write a weights file with one tensor of any shape, offsets and dtype.

    ``size`` is the number of bytes that the file has after its header.
    """
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return safetensors({"user.weight": entry}, b"\0" * size)


def link(name: str, to: Callable[[Path], Path]) -> Change:
    """Replace a file by a symlink; ``to`` returns its target for the folder of the draft."""

    def apply(draft: Path) -> None:
        (draft / name).unlink(missing_ok=True)
        (draft / name).symlink_to(to(draft))

    return apply


def pipe(name: str) -> Change:
    """Replace a file by a named pipe."""

    def apply(draft: Path) -> None:
        (draft / name).unlink(missing_ok=True)
        os.mkfifo(draft / name)

    return apply


def all_of(*changes: Change) -> Change:
    """Apply several changes."""

    def apply(draft: Path) -> None:
        for change in changes:
            change(draft)

    return apply


def vocabulary(path: str) -> Change:
    """Add a vocabulary with this path."""
    return edit(lambda content: content.update(vocabularies={"v": path}))


def inputs(change: Callable[[list[dict[str, Any]]], object]) -> Change:
    """Change the inputs of the signature: ids ``user``, ``item``, bag ``tags``, and ``dense``."""
    return edit(lambda content: change(content["signature"]["inputs"]))


def network(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the section ``network``."""
    return edit(lambda content: change(content["network"]))


def architecture(path: str) -> Change:
    """Change the path of the network's class."""
    return network(lambda content: content["architecture"].update(path=path))


def config(**values: Any) -> Change:
    """Change arguments of the network's class."""
    return network(lambda content: content["architecture"]["config"].update(values))


def module(record: dict[str, Any], name: str = "user") -> Change:
    """Add the record of a compressed module."""
    return network(lambda content: content.update(modules={name: record}))


def _zip(name: str) -> bytes:
    """Return a zip file that contains a file with this name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    return buffer.getvalue()


def _deep_folder(draft: Path) -> None:
    """Create a vocabulary folder with 300 nested folders."""
    (draft / "v").joinpath(*["d"] * 300).mkdir(parents=True)
    (draft / "v").joinpath(*["d"] * 300, "f").write_text("x")


def _outside(draft: Path) -> Path:
    """Return the path of the secret file outside the draft."""
    return draft.parent / SECRET_FILE


def _replace_by_link(name: str) -> Change:
    """Move a file out of the draft, and replace it by a symlink to it."""

    def apply(draft: Path) -> None:
        shutil.move(draft / name, draft.parent / f"moved-{name}")
        (draft / name).symlink_to(draft.parent / f"moved-{name}")

    return apply


def many_rows(count: int) -> Change:
    """Write a small test file with a very large number of equal rows."""

    def apply(draft: Path) -> None:
        table = pq.read_table(draft / "test.parquet")
        equal = pa.table(
            {
                name: pa.array([table[name][0].as_py()] * 100_000, table[name].type)
                for name in table.column_names
            }
        )
        with pq.ParquetWriter(draft / "test.parquet", equal.schema, compression="zstd") as writer:
            for _ in range(count // 100_000):
                writer.write_table(equal)

    return apply


def footer(change: Callable[[bytes], bytes]) -> Change:
    """Change the footer of the test file."""

    def apply(draft: Path) -> None:
        raw = (draft / "test.parquet").read_bytes()
        (length,) = struct.unpack("<I", raw[-8:-4])
        start = len(raw) - 8 - length
        changed = change(raw[start:-8])
        tail = struct.pack("<I", len(changed)) + b"PAR1"
        (draft / "test.parquet").write_bytes(raw[:start] + changed + tail)

    return apply


def cut(size: int) -> Change:
    """Remove the last ``size`` bytes of the test file."""

    def apply(draft: Path) -> None:
        file = draft / "test.parquet"
        file.write_bytes(file.read_bytes()[:-size])

    return apply


ROWS_600 = b"\xb0\x09"  # the number of test rows in a parquet footer, as a zigzag varint

# Contents of a whole model.json.
JSON_BODIES: dict[str, Callable[[], bytes]] = {
    "depth 100,000": lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "depth 900": lambda: b'{"schema_version":1,"x":' + b"[" * 900 + b"]" * 900 + b"}",
    "a million open lists": lambda: b"[" * 1_000_000,
    "64 MB of empty lists": lambda: b'{"a":[' + b"[]," * 21_000_000 + b"[]]}",
    "two million numbers": lambda: b'{"a":[' + b"1," * 2_000_000 + b"1]}",
    "a key twice": lambda: b'{"schema_version":1,"schema_version":1}',
    "NaN": lambda: b'{"schema_version":NaN}',
    "Infinity": lambda: b'{"schema_version":-Infinity}',
    "1e999": lambda: b'{"schema_version":1e999}',
    "an integer of 5,000 digits": lambda: b'{"schema_version":' + b"9" * 5000 + b"}",
    "an integer of 10 MB": lambda: b'{"schema_version":' + b"9" * 10_000_000 + b"}",
    "a lone surrogate": lambda: b'{"schema_version":1,"name":"\\ud800"}',
    "a byte order mark": lambda: b"\xef\xbb\xbf{}",
    "UTF-16": lambda: "{}".encode("utf-16"),
    "a text of 70 MB": lambda: b'{"a":"' + b"x" * 70_000_000 + b'"}',
    "nothing": lambda: b"",
    "null": lambda: b"null",
    "a list": lambda: b"[]",
    "a text": lambda: b'"x"',
    "a null character": lambda: b'{"schema_version":1,"name":"a\\u0000b"}',
}
# Texts that the cases write to fields of model.json.
PATHS = (
    "/etc/passwd", "../secret.txt", "../../../../etc/passwd", "file:///etc/passwd",
    "http://127.0.0.1/x", "C:\\x", "a\\b", "/dev/zero", "/proc/self/environ", "", "a\0b", ".", " ",
    "s3://x/y", "x" * 5000, "..", "/", "//etc/passwd", "test.parquet/",
)  # fmt: skip
NAMES = (
    "../x", "a/b", "a b", "ünï", "a\nb", "x" * 10_000, "-x", ".x", "", "a:b", "=cmd()", "<script>",
    "\x1b[31m", "a\u202eb", "a..b/", "..", "x" * 65, "a\n",
)  # fmt: skip
VERSIONS = ("../1", "1/2", "", "\n", "1\n", "x" * 65, "1 2", "\u0661")
ARCHITECTURES = (
    "os:system", "posix:system", "draft_network:torch", "draft_network.torch:nn",
    "draft_network:__import__", "draft_network:__builtins__", "draft_network:ClickNet.__init__",
    "draft_network.os:system", "draft_network:ClickNet\n", "draft_network :ClickNet",
    "draft_network:__loader__", "draft_network.__class__:x", "subprocess:Popen", "torch.nn:Linear",
    "draft_networkx:ClickNet", "..draft_network:ClickNet", "draft_network:", "x" * 5000 + ":y",
    "draft_network:ClickNet:x", "builtins:eval", "draft_network:DoesNotExist",
    "tests.draft_network:ClickNet", "draft_network.sub:X", "\uff44raft_network:ClickNet",
)  # fmt: skip

# The header entry of a safetensors tensor with one float.
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
CASES: dict[str, Change] = {
    **{
        f"pickle {protocol} as {name}": write_pickle(name, protocol)
        for name in ("extra.pkl", "model.bin", "evil.safetensors", "model.safetensors", "x.npy")
        for protocol in (0, 4)
    },
    "zip as safetensors": write("model.safetensors", _zip("../../evil")),
    "safetensors header of 2^63 bytes": safetensors({}, length=2**63),
    "safetensors header of 2^64-1 bytes": safetensors({}, length=2**64 - 1),
    "safetensors header of 100 MB": safetensors({}, length=100_000_000),
    "safetensors empty": write("model.safetensors", b""),
    "safetensors of 7 bytes": write("model.safetensors", b"\1" * 7),
    "safetensors offsets overlap": safetensors(
        {
            "user.weight": {**ONE, "shape": [4], "data_offsets": [0, 16]},
            "b": {**ONE, "shape": [4], "data_offsets": [8, 24]},
        },
        b"\0" * 24,
    ),
    "safetensors offsets out of range": tensor([2, 2], [0, 1 << 40]),
    "safetensors offsets reversed": tensor([0], [16, 0]),
    "safetensors offsets negative": tensor([2, 2], [-16, 0]),
    "safetensors offsets with a hole": tensor([2, 2], [16, 32], size=32),
    "safetensors shape overflows": tensor([2**62, 2**62], [0, 16]),
    "safetensors shape negative": tensor([-2, 2], [0, 16]),
    "safetensors shape of floats": tensor([2.0, 2], [0, 16]),
    "safetensors shape without rows": tensor([0, 16], [0, 0], size=0),
    "safetensors dtype unknown": tensor([4], [0, 16], "F1337"),
    "safetensors dtype of another size": tensor([2, 2], [0, 16], "F64"),
    "safetensors tensor twice": safetensors(
        b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", b"\0" * 8
    ),
    "safetensors metadata of 5 MB": safetensors(
        {"__metadata__": {"k": "x" * 5_000_000}, "user.weight": ONE}, b"\0" * 4
    ),
    "safetensors metadata of numbers": safetensors(
        {"__metadata__": {"k": [1]}, "user.weight": ONE}, b"\0" * 4
    ),
    "safetensors header of depth 2,000": safetensors(b'{"a":' * 2000 + b"1" + b"}" * 2000),
    "safetensors header not UTF-8": safetensors(b'{"\xff\xfe":1}'),
    "safetensors header a list": safetensors(b"[1,2]"),
    "safetensors of 300,000 tensors": lambda draft: safetensors(
        {f"t{number}": {**ONE, "shape": [0], "data_offsets": [0, 0]} for number in range(300_000)}
    )(draft),
    "safetensors name with control characters": safetensors(
        {"\x1b[31mred\x1b]0;title\x07": ONE}, b"\0" * 4
    ),
    "safetensors with bytes after the end": safetensors({"user.weight": ONE}, b"\0" * 400),
    **{
        f"model.json: {name}": write_later("model.json", body) for name, body in JSON_BODIES.items()
    },
    **{f"name {text[:12]!r}": edit(lambda d, t=text: d.update(name=t)) for text in NAMES},
    **{f"version {text[:12]!r}": edit(lambda d, t=text: d.update(version=t)) for text in VERSIONS},
    **{f"architecture {text[:40]!r}": architecture(text) for text in ARCHITECTURES},
    "config of 1e15 rows": config(users=10**15),
    "config of 2^63 rows": config(users=2**63),
    "config with a negative size": config(users=-1),
    "config with a fraction": config(users=1.5),
    "config with a text": config(users="300"),
    "config with a wide table": config(dim=10**9),
    "config with an unknown name": config(zzz=1),
    "config with self": config(self=1),
    "config with a list": config(users=[1]),
    "config with a wide layer": config(hidden=10**12),
    **{f"data {text[:25]!r}": edit(lambda d, t=text: d["data"].update(test=t)) for text in PATHS},
    **{f"vocabulary {text[:25]!r}": vocabulary(text) for text in PATHS},
    **{
        f"vocabulary named {text[:20]!r}": edit(
            lambda d, t=text: d.update(vocabularies={t: "model.json"})
        )
        for text in ("../x", "/abs", "a/../../b", "\x1b[31m", "a\nb", "x" * 5000, "", "model.json")
    },
    "link to a secret as data": link("test.parquet", _outside),
    "link to a secret as vocabulary": all_of(link("v.txt", _outside), vocabulary("v.txt")),
    "link to /etc as vocabulary": all_of(link("v", lambda _: Path("/etc")), vocabulary("v")),
    "vocabulary through a linked folder": all_of(
        link("v", lambda draft: draft.parent), vocabulary(f"v/{SECRET_FILE}")
    ),
    "vocabulary folder with a link": all_of(
        lambda draft: (draft / "v").mkdir(),
        link("v/s", _outside),
        vocabulary("v"),
    ),
    "weights are a link": _replace_by_link("model.safetensors"),
    "model.json is a link": _replace_by_link("model.json"),
    "pipe as weights": pipe("model.safetensors"),
    "pipe as data": pipe("test.parquet"),
    "pipe as model.json": pipe("model.json"),
    "pipe as another json": pipe("x.json"),
    "pipe as index": pipe("model.safetensors.index.json"),
    "pipe as vocabulary": all_of(pipe("v.txt"), vocabulary("v.txt")),
    "pipe in a vocabulary folder": all_of(
        lambda draft: (draft / "v").mkdir(), pipe("v/f"), vocabulary("v")
    ),
    "vocabulary folder of depth 300": all_of(_deep_folder, vocabulary("v")),
    "model.json is a folder": lambda draft: (
        (draft / "model.json").unlink(),
        (draft / "model.json").mkdir(),
    )[1],
    "safetensors is a folder": lambda draft: (draft / "x.safetensors").mkdir(),
    "index with a path outside": write(
        "model.safetensors.index.json",
        b'{"weight_map": {"user.weight": "../../x.safetensors"}}',
    ),
    "index with a list": write("model.safetensors.index.json", b'{"weight_map":[1]}'),
    "parquet of 5 million equal rows": many_rows(5_000_000),
    "parquet footer that declares 8,191 rows": footer(lambda b: b.replace(ROWS_600, b"\xfe\x7f")),
    "parquet footer that declares a billion rows": footer(
        lambda b: b.replace(ROWS_600, b"\x80\xa8\xd6\xb9\x07")
    ),
    "parquet footer of 2 GiB": write(
        "test.parquet", b"PAR1" + struct.pack("<I", 0x7FFFFFFF) + b"PAR1"
    ),
    "parquet cut short": cut(100),
    "parquet is text": write("test.parquet", b"user,item\n1,2\n"),
    "input name with control characters": inputs(lambda i: i[0].update(name="\x1b[31muser")),
    "input column with a formula": inputs(lambda i: i[0].update(columns=['=HYPERLINK("x")'])),
    "input table with dots": inputs(lambda i: i[0].update(table="__class__.__init__")),
    "input table forward": inputs(lambda i: i[0].update(table="forward")),
    "input table without a name": inputs(lambda i: i[0].update(table="")),
    "jagged bag of 1e12 ids": inputs(lambda i: i[2].update(shape=[10**12])),
    "dense input of width 1e12": inputs(lambda i: i[3].update(shape=[10**12])),
    "dense input of a million columns": inputs(
        lambda i: i[3].update(shape=[10**6], columns=["d0"] * 10**6)
    ),
    "default row 1e18": inputs(lambda i: i[1].update(default_row=10**18)),
    "input kind with control characters": inputs(lambda i: i[0].update(kind="\x1b[31mred")),
    "negative padding": inputs(
        lambda i: i.__setitem__(
            0,
            {"kind": "padded_bag", "name": "user", "table": "user", "shape": [5], "padding_id": -5},
        )
    ),
    "tie to itself": network(lambda n: n.update(ties={"user.weight": "user.weight"})),
    "tie of __class__": network(lambda n: n.update(ties={"__class__": "user.weight"})),
    "module of an unknown format": module({"kind": "table", "format": "../../x", "settings": {}}),
    "module of 1e15 rows": module(
        {"kind": "table", "format": "rowwise_int8", "settings": {"rows": 10**15, "dim": 10**6}}
    ),
    "module with __class__": module(
        {
            "kind": "table",
            "format": "rowwise_int8",
            "settings": {"rows": 3000, "dim": 16, "__class__": "x", "self": 1},
        }
    ),
    "module named forward": module(
        {"kind": "table", "format": "rowwise_int8", "settings": {"rows": 3000, "dim": 16}},
        "forward",
    ),
    "module with markup in its name": module(
        {"kind": "table", "format": "rowwise_int8", "settings": {}}, "x[/red]"
    ),
}
"""All cases by name. The draft that they change has 3,000 users and 600 test rows."""

HARMLESS = {
    # Pack neither reads nor stores files that model.json does not name.
    "pickle 0 as x.npy",
    "pickle 4 as x.npy",
    "pipe as another json",
    # The same file with another spelling, and a valid name or folder.
    "data 'test.parquet/'",
    "vocabulary 'test.parquet/'",
    "vocabulary named 'model.json'",
    "vocabulary folder of depth 300",
    # The user may store these files elsewhere; only a valid file of the format is accepted.
    "weights are a link",
    "model.json is a link",
}
"""Cases that pack may accept, because no code runs and no secret file is stored.

Weights and ``model.json`` may be links: pack stores them although these files are outside.
"""
