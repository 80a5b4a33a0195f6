"""Bundles and drafts: reading, sealing, and refusal of unsafe, changed or inconsistent folders.

A draft is a folder as a user writes it. Sealing a folder writes its ``model.json`` with the hashes
of all files, and with a seal, the hash of ``model.json`` itself.

A refusal is the error ``BundleRefused``. Tests check its code and fields, or a part of its message
if the message is from a JSON or safetensors parser.

A ``TensorFact`` is shape, dtype and size of one stored tensor. The field ``near`` of a reason has
the most similar names that exist, and ``place`` is an index in a tensor. ``place`` of a refusal is
the beginning of its message.

``ties`` map the name of a parameter that is not stored to the tensor that it shares. The sections
``vocabularies`` and ``transforms`` refer to files that are stored unchanged with the model.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from error_codes import HasReason, raises_code, value_errors
from hypothesis import given
from hypothesis import strategies as st
from reason_codes import codes_of

from compressors.contracts import (
    Architecture,
    Artifact,
    ModuleRecord,
    Network,
    Reason,
    Signature,
    tensor_names,
)
from compressors.contracts.value_errors import value_error
from compressors.core.state.tensor_files import write_tensors
from infra.bundle import bundle_folder, shards
from infra.bundle.architecture import network_class
from infra.bundle.json_limits import MAX_JSON_BYTES
from infra.bundle.schema_versions import KNOWN_VERSIONS
from infra.errors import BundleRefused

ARTIFACT = Artifact(uri="file:///data", sha256="1" * 64, bytes=10)
DATA = {
    "train": bundle_folder.DataReference(artifact=ARTIFACT, file="train.parquet", rows=100),
    "test": bundle_folder.DataReference(artifact=ARTIFACT, file="test", rows=10),
}
SIGNATURE = Signature.model_validate(
    {
        "inputs": [
            {"kind": "id", "name": "user", "table": "embed.user"},
            {"kind": "jagged_bag", "name": "genres", "shape": [8], "table": "embed.genres"},
            {"kind": "dense", "name": "age", "shape": [1]},
        ],
        "outputs": [
            {"name": "click", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}
        ],
    }
)
NETWORK = Network(architecture=Architecture(path="examples.tiny:Net", config={"dim": 4, "p": 0.5}))
WEIGHTS = {
    "embed.user.weight": torch.arange(20, dtype=torch.float32).reshape(5, 4),
    "embed.genres.weight": torch.ones(3, 4, dtype=torch.bfloat16),
    "dense.bias": torch.zeros(7),
}
FIELDS = {
    "name": "tiny",
    "version": "V1",
    "signature": SIGNATURE,
    "network": NETWORK,
    "data": DATA,
}
# With at most 60 bytes per shard, ``WEIGHTS`` are stored in two shards.
EVERY_SHARDING = pytest.mark.parametrize("shard_bytes", [1 << 20, 60], ids=["one", "several"])


def make_bundle(folder, shard_bytes=1 << 20, **changes):
    """Write a bundle with ``WEIGHTS`` and with ``FIELDS``, some of them changed."""
    folder.mkdir(exist_ok=True)
    write_tensors(WEIGHTS, folder, shard_bytes)
    bundle_folder.seal(folder, **{**FIELDS, **changes})
    return folder


@pytest.fixture
def sealed(tmp_path):
    """A bundle with one shard."""
    return make_bundle(tmp_path / "sealed")


@pytest.fixture
def sharded(tmp_path):
    """A bundle with two shards and their index."""
    return make_bundle(tmp_path / "sharded", 60)


@pytest.fixture
def draft(tmp_path):
    """A draft: weights, a parquet file, and a ``model.json`` as a user writes it."""
    folder = tmp_path / "draft"
    folder.mkdir()
    write_tensors(WEIGHTS, folder)
    (folder / "train.parquet").write_bytes(b"PAR1")
    write_draft(folder)
    return folder


def draft_document():
    """Return the ``model.json`` of the draft."""
    return {
        "schema_version": 2,
        "name": "tiny",
        "version": "V1",
        "signature": SIGNATURE.model_dump(mode="json"),
        "network": NETWORK.model_dump(mode="json"),
        "data": {"train": "train.parquet"},
    }


def write_draft(folder, **changes):
    """Write the ``model.json`` of the draft, with some fields changed."""
    (folder / "model.json").write_text(json.dumps(draft_document() | changes))


def document_of(folder):
    """Read the ``model.json`` in a folder."""
    return json.loads((folder / "model.json").read_text())


def reseal(folder, document):
    """Write any fields as ``model.json`` with a correct seal, as a hostile program can."""
    fields = {name: value for name, value in document.items() if name != "seal"}
    body = json.dumps(fields, indent=2).removesuffix("\n}").encode() + b",\n"
    digest = hashlib.sha256(body).hexdigest()
    (folder / "model.json").write_bytes(body + f'  "seal": "{digest}"\n}}\n'.encode())


def rewrite_file_list(folder):
    """Write a ``model.json`` with the hashes of the current files, as a hostile program can."""
    document = document_of(folder)
    document["files"] = {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in folder.iterdir()
        if path.name != "model.json"
    }
    reseal(folder, document)


def refusal_of(function, *arguments, **keywords):
    """Return the ``BundleRefused`` that a call raises."""
    with pytest.raises(BundleRefused) as caught:
        function(*arguments, **keywords)
    return caught.value


def refusal_message(function, *arguments, **keywords):
    """Return the message of the ``BundleRefused`` that a call raises."""
    return str(refusal_of(function, *arguments, **keywords))


def problems(function, *arguments, **keywords):
    """Return the reasons in the ``BundleRefused`` that a call raises.

    They equal a ``HasReason`` if one of them has its code and its fields.
    """
    fault = refusal_of(function, *arguments, **keywords)
    assert fault.code == "unusable", fault
    assert all(isinstance(problem, Reason) for problem in fault.fields["problems"])
    return fault.fields["problems"]


def field_errors(function, *arguments, **keywords):
    """Return code and fields of each pydantic error that is a cause of a call's refusal."""
    fault = refusal_of(function, *arguments, **keywords)
    assert fault.code == "fields_unusable", fault
    return value_errors(fault.__cause__)


def safetensors_bytes(header, body=b""):
    """Return the bytes of a safetensors file with this header, valid or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


# --- Valid bundles ---------------------------------------------------------------------------


@EVERY_SHARDING
def test_read_returns_the_manifest_that_seal_returned(tmp_path, shard_bytes):
    folder = tmp_path / "b"
    folder.mkdir()
    paths = write_tensors(WEIGHTS, folder, shard_bytes)
    manifest = bundle_folder.seal(
        folder, **FIELDS, parents=[ARTIFACT], vocabularies={"genres": ARTIFACT}
    )
    assert bundle_folder.read(folder) == manifest
    assert bundle_folder.tensor_files(folder) == paths
    assert len(paths) == (1 if shard_bytes > 60 else 2)
    assert (folder / bundle_folder.INDEX).exists() == (len(paths) > 1)
    facts = bundle_folder.check_weights(folder, manifest)
    assert facts == {
        "embed.user.weight": bundle_folder.TensorFact(shape=(5, 4), dtype="F32", bytes=80),
        "embed.genres.weight": bundle_folder.TensorFact(shape=(3, 4), dtype="BF16", bytes=24),
        "dense.bias": bundle_folder.TensorFact(shape=(7,), dtype="F32", bytes=28),
    }
    assert bundle_folder.table_rows(facts, manifest) == {"embed.user": 5, "embed.genres": 3}


def test_index_has_the_form_of_hugging_face(sharded):
    index = json.loads((sharded / bundle_folder.INDEX).read_text())
    assert index["metadata"] == {"total_size": 132}  # 80 + 24 + 28 bytes
    assert index["weight_map"]["embed.user.weight"] == "model-00001-of-00002.safetensors"


def test_seal_replaces_an_earlier_manifest_and_a_partial_file(sealed):
    (sealed / "model.json.partial").write_text("half")
    bundle_folder.seal(sealed, **{**FIELDS, "version": "V2"})
    assert bundle_folder.read(sealed).version == "V2"
    assert sorted(p.name for p in sealed.iterdir()) == ["model.json", "model.safetensors"]


def test_seal_returns_tuples_in_settings_as_lists(sealed):
    network = Network(architecture=Architecture(path="a:B", config={"hidden": (4, 2)}))
    manifest = bundle_folder.seal(sealed, **{**FIELDS, "network": network})
    assert manifest.network.architecture.config == {"hidden": [4, 2]}
    assert bundle_folder.read(sealed) == manifest


def test_safetensors_header_that_begins_like_a_pickle_is_accepted(tmp_path):
    """A header of 0x0280 to 0x0580 bytes begins with the first two bytes of a pickle."""
    entry = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for length in (0x280, 0x380, 0x480, 0x580):
        raw = json.dumps(entry).encode()
        (tmp_path / "model.safetensors").write_bytes(
            safetensors_bytes(raw + b" " * (length - len(raw)), b"\0" * 4)
        )
        bundle_folder.seal(tmp_path, **FIELDS)
        assert list(bundle_folder.check_weights(tmp_path, bundle_folder.read(tmp_path))) == ["a"]


def test_table_rows_of_a_compressed_and_of_a_tied_table(tmp_path):
    network = Network(
        architecture=NETWORK.architecture,
        modules={"embed.user": ModuleRecord(kind="table", format="int8", settings={"rows": 9})},
        ties={"embed.genres.weight": "shared"},
    )
    write_tensors({"shared": torch.ones(6, 2), "embed.user.codes": torch.ones(9)}, tmp_path)
    manifest = bundle_folder.seal(tmp_path, **{**FIELDS, "network": network})
    facts = bundle_folder.check_weights(tmp_path, manifest)
    assert bundle_folder.table_rows(facts, manifest) == {"embed.user": 9, "embed.genres": 6}


def test_draft_with_relative_and_absolute_paths_is_read(draft, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_draft(
        draft,
        data={"train": "train.parquet", "test": str(tmp_path / "elsewhere")},
        vocabularies={"genres": "./train.parquet"},
    )
    read = bundle_folder.read_draft(draft)
    assert read.data["train"] == "train.parquet"
    assert (draft / read.data["test"]).is_dir()


# --- Files in the folder ---------------------------------------------------------------------


@pytest.mark.parametrize("ending", shards.PICKLE_SUFFIXES)
def test_file_with_a_suffix_of_pickles_is_refused(sealed, draft, ending):
    expected = HasReason("file_named_like_pickle", file=f"'model{ending.upper()}'")
    for folder, read in ((sealed, bundle_folder.read), (draft, bundle_folder.read_draft)):
        (folder / f"model{ending.upper()}").write_bytes(b"")
        assert problems(read, folder) == expected
    assert problems(bundle_folder.seal, sealed, **FIELDS) == expected
    assert "safetensors.torch.save_file" in refusal_message(bundle_folder.seal, sealed, **FIELDS)


def pickles():
    """Yield a name and the first bytes of each form of pickle."""
    yield "protocol 2", b"\x80\x02}q\x00."
    yield "protocol 4", b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94."
    yield "protocol 0 dict", b"(dp0\n."
    yield "protocol 0 call", b"cos\nsystem\n(S'true'\ntR."
    yield "zip", b"PK\x03\x04" + b"\0" * 60


@pytest.mark.parametrize("raw", [raw for _, raw in pickles()], ids=[name for name, _ in pickles()])
def test_pickle_renamed_to_safetensors_is_refused_although_sealed(sealed, draft, raw):
    expected = HasReason("file_is_pickle", file="'model.safetensors'")
    for folder, read in ((sealed, bundle_folder.read), (draft, bundle_folder.read_draft)):
        (folder / "model.safetensors").write_bytes(raw)
        if folder is sealed:
            rewrite_file_list(folder)
        assert problems(read, folder) == expected
    assert problems(bundle_folder.seal, sealed, **FIELDS) == expected
    assert "safetensors.torch.save_file" in refusal_message(bundle_folder.seal, sealed, **FIELDS)


def test_file_of_torch_save_is_refused_under_any_name(sealed):
    for is_zip in (True, False):  # False: the format before torch 1.6
        torch.save(WEIGHTS, sealed / "model.safetensors", _use_new_zipfile_serialization=is_zip)
        assert zipfile.is_zipfile(sealed / "model.safetensors") == is_zip
        assert problems(bundle_folder.read, sealed) == HasReason("file_is_pickle")


@pytest.mark.parametrize(
    ("change_folder", "code", "file"),
    [
        (lambda f: (f / "README.md").write_text("hi"), "file_of_other_kind", "README.md"),
        (lambda f: (f / "more.safetensors").write_bytes(b"x"), "file_unlisted", "more.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "file_missing", "model.safetensors"),
        (lambda f: (f / "sub").mkdir(), "file_is_folder", "sub"),
        (lambda f: os.mkfifo(f / "pipe.safetensors"), "file_is_special", "pipe.safetensors"),
        (lambda f: (f / "m.safetensors").symlink_to("/etc/hosts"), "file_is_link", "m.safetensors"),
        (lambda f: (f / "m.safetensors").symlink_to("gone"), "file_is_link", "m.safetensors"),
        (lambda f: replace_by_symlink(f, "model.safetensors"), "file_is_link", "model.safetensors"),
        (lambda f: replace_by_symlink(f, "model.json"), "file_is_link", "model.json"),
        (lambda f: append_byte(f / "model.safetensors"), "file_size_differs", "model.safetensors"),
    ],
)
def test_folder_that_differs_from_its_manifest_is_refused(sealed, change_folder, code, file):
    size = (sealed / "model.safetensors").stat().st_size
    change_folder(sealed)
    sizes = {"expected": size, "got": size + 1} if code == "file_size_differs" else {}
    assert problems(bundle_folder.read, sealed) == HasReason(code, file=repr(file), **sizes)


def test_missing_folder_and_folder_without_a_manifest_are_refused(sealed):
    (sealed / "model.json").unlink()
    with raises_code(BundleRefused, "json_missing", path=str(sealed / "model.json")):
        bundle_folder.read(sealed)
    shutil.rmtree(sealed)
    with raises_code(BundleRefused, "folder_unreadable", folder=str(sealed)):
        bundle_folder.read(sealed)


def replace_by_symlink(folder, name):
    """Move a file out of its folder and replace it by a symlink to it."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def append_byte(path):
    path.write_bytes(path.read_bytes() + b"\0")


def test_file_instead_of_a_bundle_folder_is_refused(sealed):
    assert "is not a folder" in refusal_message(bundle_folder.read, sealed / "model.json")


def test_refusal_lists_all_problems_of_a_folder(sharded):
    (sharded / FIRST_SHARD).unlink()
    append_byte(sharded / "model-00002-of-00002.safetensors")
    (sharded / "extra.safetensors").write_bytes(b"")
    reasons = problems(bundle_folder.read, sharded)
    assert codes_of(reasons) == ["file_missing", "file_unlisted", "file_size_differs"]
    assert refusal_message(bundle_folder.read, sharded).count("\n- ") == 3


@EVERY_SHARDING
def test_bundle_with_one_changed_byte_is_refused(tmp_path_factory, shard_bytes):
    folder = make_bundle(tmp_path_factory.mktemp("flip") / "b", shard_bytes)
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    total = sum(map(len, originals.values()))

    @given(offset=st.integers(0, total - 1), flip=st.integers(1, 255))
    def check(offset, flip):
        """Flip bits of the byte at an offset in the concatenation of all files."""
        for path, raw in originals.items():
            if offset < len(raw):
                changed = bytearray(raw)
                changed[offset] ^= flip
                path.write_bytes(changed)
                try:
                    refusal_message(bundle_folder.read, folder)
                finally:
                    path.write_bytes(raw)
                return
            offset -= len(raw)

    check()
    bundle_folder.read(folder)


def test_changed_weight_is_reported_as_another_hash(sealed):
    path = sealed / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    (problem,) = problems(bundle_folder.read, sealed)
    assert problem == HasReason("file_hash_differs", file="'model.safetensors'", got=digest)


def test_edited_manifest_is_reported_as_another_seal(sealed):
    text = (sealed / "model.json").read_text()
    (sealed / "model.json").write_text(text.replace('"tiny"', '"tony"'))
    assert "was changed after it was sealed" in refusal_message(bundle_folder.read, sealed)


# --- model.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message_part"),
    [
        (b"", "not usable JSON"),
        (b"{", "not usable JSON"),
        (b"\xff\xfe", "not usable JSON"),
        (b"\xef\xbb\xbf{}", "not usable JSON"),
        (b"[]", "must be one JSON object, not a list"),
        (b"null", "must be one JSON object, not a NoneType"),
        (b'{"name": 1, "name": 2}', "duplicate name 'name'"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate name 'b'"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "Infinity is not a JSON number"),
        (b'{"a": 1e999}', "too large for a number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not usable JSON"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested too deep"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[" + b"1," * 1_600_000 + b"1]", "more than 1500000 values"),
        (b"{}", "has schema_version None; this recpress knows 2"),
        (b'{"schema_version": 3}', "knows 2. Upgrade recpress"),
        (b'{"schema_version": 0}', 'Write "schema_version": 2'),
        (b'{"schema_version": true}', "has schema_version True"),
        (b'{"schema_version": 2.0}', "has schema_version 2.0"),
        (b'{"schema_version": "2"}', "has schema_version '2'"),
    ],
    ids=range(24),
)
@pytest.mark.parametrize("read", [bundle_folder.read, bundle_folder.read_draft])
def test_ambiguous_or_invalid_model_json_is_refused(sealed, read, raw, message_part):
    (sealed / "model.json").write_bytes(raw)
    assert message_part in refusal_message(read, sealed)


@pytest.mark.parametrize("read", [bundle_folder.read, bundle_folder.read_draft])
def test_too_large_model_json_is_refused_before_it_is_read(sealed, read, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    with (sealed / "model.json").open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no disk
    assert "at most 25165824 are allowed" in refusal_message(read, sealed)


@pytest.mark.parametrize(
    ("path", "value", "message_part"),
    [
        # The value ``...`` removes the field.
        (("name",), "Upper", "name: String should match pattern"),
        (("name",), "../x", "name: String should match pattern"),
        (("version",), "a" * 65, "version: String should match pattern"),
        (
            ("signature", "outputs", 0, "metric"),
            ...,
            "signature.outputs[0].metric is missing; add it",
        ),
        (("signature", "labels"), "x", "signature.labels is not a field of this format"),
        (("signature", "inputs", 0, "kind"), "ids", "signature.inputs[0]: Input tag 'ids'"),
        (("signature", "inputs", 0, "table"), ..., "signature.inputs[0].table is missing"),
        *(
            (("signature", "inputs", 0), {"kind": kind}, "signature.inputs[0].name is missing")
            for kind in ("sequence", "tokens", "integer", "key", "matrix")
        ),
        (("signature", "inputs", 1, "shape"), [0], "signature.inputs[1]: bag 'genres' needs"),
        (
            ("signature", "inputs", 1, "name"),
            "user",
            "the name(s) user are used by several inputs",
        ),
        (("network", "architecture", "path"), "os.system", "network.architecture.path"),
        (("data", "holdout"), "x", "data.holdout: Input should be 'train'"),
        (("files", "model.safetensors", "sha256"), "0", "files.model.safetensors.sha256"),
        (("files", "model.safetensors", "bytes"), -1, "greater than or equal to 0; found -1"),
        (("files", "model.json"), {"sha256": "0" * 64, "bytes": 1}, "cannot contain its own hash"),
        (("\x1b[2J",), 1, r"'\x1b[2J' is not a field"),
    ],
)
def test_refusal_of_a_wrong_field_contains_its_location(sealed, path, value, message_part):
    document = document_of(sealed)
    parent = document
    for part in path[:-1]:
        parent = parent[part]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    reseal(sealed, document)
    assert message_part in refusal_message(bundle_folder.read, sealed)


def test_refusal_of_a_wrong_field_contains_its_value_once(sealed):
    document = document_of(sealed)
    document["signature"]["inputs"][1]["shape"] = [0]
    document["version"] = ""
    reseal(sealed, document)
    reasons = refusal_of(bundle_folder.read, sealed).fields["problems"]
    assert reasons[0].endswith("; found ''.")
    sentence = value_error("bag_shape_form", name="genres")
    assert reasons[1] == f"signature.inputs[1]: {sentence}."


def test_refusal_lists_all_wrong_fields_up_to_a_limit(draft):
    write_draft(draft, name="X", version="", data={}, signature=1)
    message = refusal_message(bundle_folder.read_draft, draft)
    assert re.search(r"\n- name: .*\n- version: .*\n- signature: ", message)
    write_draft(draft, **{f"x{number}": 1 for number in range(50)})
    message = refusal_message(bundle_folder.read_draft, draft)
    assert message.count("\n") == 21  # a line for each of 20 problems, and the last line
    assert message.endswith("and more.")


@pytest.mark.parametrize(
    "change", [{"name": "x" * 100_000}, {"signature": {"outputs": [{"kind": "y" * 100_000}]}}]
)
def test_refusal_with_long_values_has_a_bounded_length(draft, change):
    write_draft(draft, **change)
    message = refusal_message(bundle_folder.read_draft, draft)
    assert len(message) < 2_500, "two sentences of 900 characters and a path"
    document = json.loads((draft / "model.json").read_text())
    document["signature"]["inputs"] = [{"kind": "z" * 100_000}] * 3
    (draft / "model.json").write_text(json.dumps(document))
    assert len(refusal_message(bundle_folder.read_draft, draft)) < 20 * 900


UNSAFE_PATHS = [
    ("../model.safetensors", "path_with_parent"),
    ("a/../../model.safetensors", "path_with_parent"),
    ("..", "path_with_parent"),
    ("..\\model.safetensors", "path_with_backslash"),
    ("a\0b", "path_not_printable"),
    ("", "path_not_printable"),
    ("C:model", "path_with_scheme"),
    ("s3://bucket/model", "path_with_scheme"),
    ("a" * 300, "path_too_long"),
]


def unsafe_path_error(code, why):
    """Return the expected result of ``field_errors`` for one unsafe path."""
    return [(code, {"path": ANY, "reason": HasReason(why), "sentence": ANY})]


@pytest.mark.parametrize(("name", "why"), [*UNSAFE_PATHS, ("/etc/passwd", "path_absolute")])
def test_manifest_with_a_file_outside_the_bundle_is_refused(sealed, name, why):
    document = document_of(sealed)
    document["files"][name] = document["files"]["model.safetensors"]
    reseal(sealed, document)
    assert field_errors(bundle_folder.read, sealed) == unsafe_path_error("path_not_inside", why)


def test_manifest_with_a_file_in_a_subfolder_is_refused(sealed):
    document = document_of(sealed)
    document["files"]["sub/model.safetensors"] = document["files"]["model.safetensors"]
    reseal(sealed, document)
    (error,) = field_errors(bundle_folder.read, sealed)
    assert error == ("path_in_subfolder", {"path": "'sub/model.safetensors'", "sentence": ANY})


@pytest.mark.parametrize(("name", "why"), [*UNSAFE_PATHS, ("/etc/passwd", "path_absolute")])
@pytest.mark.parametrize("section", ["data", "vocabularies", "transforms"])
def test_manifest_with_data_outside_its_artifact_is_refused(sealed, section, name, why):
    document = document_of(sealed)
    if section == "data":
        document["data"]["train"]["file"] = name
    else:
        document[section][name] = ARTIFACT.model_dump()
    reseal(sealed, document)
    assert field_errors(bundle_folder.read, sealed) == unsafe_path_error("path_not_inside", why)


@pytest.mark.parametrize(("path", "why"), [*UNSAFE_PATHS, ("/a/../b", "path_with_parent")])
@pytest.mark.parametrize("section", ["data", "vocabularies", "transforms"])
def test_unsafe_draft_path_is_refused(draft, section, path, why):
    write_draft(draft, **{section: {"train": path}})
    assert field_errors(bundle_folder.read_draft, draft) == unsafe_path_error(
        "draft_path_unusable", why
    )


@pytest.mark.parametrize("path", ["gone.parquet", "/nowhere/gone.parquet"])
def test_draft_path_that_does_not_exist_is_refused(draft, path):
    write_draft(draft, data={"train": path})
    (problem,) = problems(bundle_folder.read_draft, draft)
    fields = {"entry": "data.train", "path": repr(path), "folder": str(draft)}
    assert problem == Reason("draft_path_missing", **fields)


def test_draft_path_through_a_symlink_to_another_folder_is_refused(draft, tmp_path):
    (tmp_path / "secret.parquet").write_bytes(b"PAR1")
    (draft / "linked.parquet").symlink_to(tmp_path / "secret.parquet")
    write_draft(draft, data={"train": "linked.parquet"})
    (problem,) = problems(bundle_folder.read_draft, draft)
    assert problem == Reason("draft_path_outside", entry="data.train", path="'linked.parquet'")


def test_draft_path_to_a_folder_that_contains_the_draft_is_refused(draft):
    write_draft(draft, data={"train": "."})
    (problem,) = problems(bundle_folder.read_draft, draft)
    assert problem == Reason("draft_path_holds_draft", entry="data.train", path="'.'")


@pytest.mark.parametrize(
    ("create", "code"),
    [
        (lambda path: path.mkdir(), "weights_are_folder"),
        (lambda path: path.symlink_to("nowhere"), "weights_are_broken_link"),
        (os.mkfifo, "weights_are_special"),
    ],
)
def test_draft_with_weights_that_are_no_plain_file_is_refused(draft, create, code):
    create(draft / "more.safetensors")
    (problem,) = problems(bundle_folder.read_draft, draft)
    assert problem == Reason(code, file="'more.safetensors'")


def test_refusal_lists_twenty_problems_of_bounded_length(sealed):
    for number in range(50):
        (sealed / f"{number}{'x' * 200}").write_bytes(b"")
    reasons = problems(bundle_folder.read, sealed)
    assert codes_of(reasons) == ["file_of_other_kind"] * 20 + ["more_problems"]
    assert all(len(str(problem)) < 900 for problem in reasons)
    facts = {"flat.weight": bundle_folder.TensorFact(shape=(1,) * 9999, dtype="F32", bytes=4)}
    inputs = [{"kind": "id", "name": "user", "table": "flat"}]
    signature = Signature.model_validate(SIGNATURE.model_dump() | {"inputs": inputs})
    manifest = bundle_folder.seal(
        make_bundle(sealed.parent / "b"), **FIELDS | {"signature": signature}
    )
    (problem,) = problems(bundle_folder.table_rows, facts, manifest)
    assert len(str(problem)) < 900


def test_draft_read_as_bundle_and_bundle_read_as_draft_are_refused(sealed, draft):
    (draft / "train.parquet").unlink()
    assert "is a draft. Pack it first: 'recpress bundle pack" in refusal_message(
        bundle_folder.read, draft
    )
    assert "already a sealed bundle" in refusal_message(bundle_folder.read_draft, sealed)


def test_draft_without_weights_is_refused(draft):
    (draft / "model.safetensors").unlink()
    assert "holds no tensor" in refusal_message(bundle_folder.read_draft, draft)


def test_seal_refuses_settings_without_a_json_form(sealed):
    for value in (torch.float16, float("nan"), -float("inf"), {1, 2}, {1: 2}, np.int64(3)):
        network = Network(architecture=Architecture(path="a:B", config={"x": value}))
        message = refusal_message(bundle_folder.seal, sealed, **{**FIELDS, "network": network})
        assert "has no JSON form" in message
    assert bundle_folder.read(sealed).network == NETWORK, "the earlier manifest is unchanged"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def test_random_or_changed_model_json_is_read_or_refused(tmp_path_factory):
    folder = make_bundle(tmp_path_factory.mktemp("fuzz") / "b")
    original = (folder / "model.json").read_text()

    def value_paths(value, path=()):
        """Yield the path of every value in a JSON document."""
        yield path
        if isinstance(value, dict):
            for name in value:
                yield from value_paths(value[name], (*path, name))
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from value_paths(item, (*path, number))

    locations = list(value_paths(json.loads(original)))[1:]

    @given(
        raw=st.binary(max_size=60)
        | JSON_VALUES.map(lambda value: json.dumps(value).encode())
        | st.text(alphabet='{}[]":,0e-\\u', max_size=60).map(str.encode)
        | st.tuples(
            st.dictionaries(st.sampled_from(sorted(json.loads(original))), JSON_VALUES),
            st.sampled_from(KNOWN_VERSIONS),
        ).map(lambda pair: json.dumps(pair[0] | {"schema_version": pair[1]}).encode())
    )
    def check_random_bytes(raw):
        (folder / "model.json").write_bytes(raw)
        refusal_message(bundle_folder.read, folder)
        refusal_message(bundle_folder.read_draft, folder)

    @given(
        path=st.sampled_from(locations), value=JSON_VALUES, change=st.sampled_from(["set", "add"])
    )
    def check_changed_document(path, value, change):
        document = json.loads(original)
        parent = document
        for part in path[:-1]:
            parent = parent[part]
        if change == "add" and isinstance(parent, dict):
            parent["something else"] = value
        else:
            parent[path[-1]] = value
        reseal(folder, document)
        with contextlib.suppress(BundleRefused):  # some changed documents are valid
            manifest = bundle_folder.read(folder)
            bundle_folder.table_rows(bundle_folder.check_weights(folder, manifest), manifest)
        # Without these fields the document is that of a draft, which ``read`` refuses.
        document.pop("files", None)
        document.pop("seal", None)
        (folder / "model.json").write_text(json.dumps(document))
        refusal_message(bundle_folder.read, folder)

    check_random_bytes()
    check_changed_document()


# --- shards ----------------------------------------------------------------------------------

# Entry of a header for a tensor of one number.
FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("raw", "message_part"),
    [
        (b"", "header too small"),
        (b"abc", "header too small"),
        (struct.pack("<Q", 10**6) + b"{}", "is not a safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "is not a safetensors file"),
        (safetensors_bytes({"a": FLOAT, "b": FLOAT}, b"0" * 4), "is not a safetensors file"),
        (safetensors_bytes({"a": FLOAT}, b"0" * 5), "is not a safetensors file"),
        (safetensors_bytes({"a": FLOAT}, b"0" * 3), "is not a safetensors file"),
        (safetensors_bytes({"a": {**FLOAT, "dtype": "X"}}, b"0" * 4), "unknown variant"),
        (safetensors_bytes({"a": {**FLOAT, "shape": [2**40] * 2}}, b"0" * 4), "overflow"),
        (safetensors_bytes(b"[1]"), "is not a safetensors file"),
        (safetensors_bytes(b"\xff\xff"), "is not a safetensors file"),
        (
            safetensors_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(FLOAT).encode(),) * 2), b"0" * 4),
            "dup",
        ),
        (safetensors_bytes({}), "holds no tensor"),
    ],
    ids=range(13),
)
def test_malformed_shard_is_refused_although_sealed(sealed, draft, raw, message_part):
    for folder, read in ((sealed, bundle_folder.read), (draft, bundle_folder.read_draft)):
        (folder / "model.safetensors").write_bytes(raw)
        if folder is sealed:
            rewrite_file_list(folder)
        assert message_part in refusal_message(read, folder)
    assert message_part in refusal_message(bundle_folder.seal, sealed, **FIELDS)


@given(
    header=JSON_VALUES | st.dictionaries(st.text(max_size=3), JSON_VALUES), size=st.integers(0, 9)
)
def test_shard_with_any_invalid_header_is_refused(tmp_path_factory, header, size):
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(header, b"0" * size))
    refusal_message(shards.stored_tensors, folder)


def change_index(folder, change):
    """Change the index of a bundle and write a ``model.json`` that matches it."""
    path = folder / bundle_folder.INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    rewrite_file_list(folder)


FIRST_SHARD = "model-00001-of-00002.safetensors"
BIAS = "dense.bias"


@pytest.mark.parametrize(
    ("change", "code", "fields"),
    [
        (lambda i: i.pop("weight_map"), "index_form", {}),
        (lambda i: i.update(weight_map=[]), "index_form", {}),
        (lambda i: i["weight_map"].update({BIAS: 3}), "index_form", {}),
        (lambda i: i["weight_map"].update({BIAS: "../x"}), "index_file_outside", {"file": "../x"}),
        (lambda i: i["weight_map"].update({BIAS: "/x"}), "index_file_outside", {"file": "/x"}),
        (lambda i: i["weight_map"].update({BIAS: "a\\x"}), "index_file_outside", {"file": "a\\x"}),
        (lambda i: i["weight_map"].update({BIAS: ".."}), "index_file_outside", {"file": ".."}),
        (
            lambda i: i["weight_map"].update({BIAS: "x.safetensors"}),
            "index_file_missing",
            {"file": "x.safetensors"},
        ),
        (
            lambda i: i["weight_map"].update({BIAS: FIRST_SHARD}),
            "index_tensor_elsewhere",
            {"tensor": BIAS, "file": FIRST_SHARD},
        ),
        (
            lambda i: i["weight_map"].update({"ghost": FIRST_SHARD}),
            "index_tensor_missing",
            {"tensor": "ghost"},
        ),
        (lambda i: i["weight_map"].pop(BIAS), "index_without_tensor", {"tensor": BIAS}),
    ],
    ids=range(11),
)
def test_index_that_differs_from_its_shards_is_refused(sharded, change, code, fields):
    manifest = bundle_folder.read(sharded)
    change_index(sharded, change)
    expected = HasReason(code, **{name: repr(value) for name, value in fields.items()})
    assert problems(bundle_folder.read, sharded) == expected
    assert problems(bundle_folder.check_weights, sharded, manifest) == expected


def test_several_shards_without_an_index_are_refused(sharded):
    (sharded / bundle_folder.INDEX).unlink()
    rewrite_file_list(sharded)
    assert f"files but no {bundle_folder.INDEX}" in refusal_message(bundle_folder.read, sharded)


def test_tensor_in_two_shards_is_refused(sharded):
    shutil.copy(sharded / FIRST_SHARD, sharded / "more.safetensors")
    rewrite_file_list(sharded)
    assert problems(bundle_folder.read, sharded) == HasReason(
        "tensor_in_two_shards",
        tensor="'embed.user.weight'",
        first=FIRST_SHARD,
        second="more.safetensors",
    )


# --- weights ---------------------------------------------------------------------------------

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
}


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_every_bit_pattern_is_finite_exactly_if_torch_reports_it_as_finite(tmp_path, dtype):
    """Compare with torch: all patterns of dtypes of 1 and 2 bytes, random ones of larger dtypes."""
    width = dtype.itemsize
    if width == 1:
        raw = np.arange(256, dtype=np.uint8)
    elif width == 2:
        raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    else:
        raw = np.random.default_rng(0).integers(0, 256, 4096 * width, dtype=np.uint8)
    patterns = torch.from_numpy(raw.copy()).view(dtype)
    if width > 2:
        special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).to(dtype)
        patterns = torch.cat([patterns, special])
    values = patterns if dtype.is_complex else patterns.to(torch.float64)
    is_nonfinite = ~torch.isfinite(values)
    assert is_nonfinite.any() != is_nonfinite.all()
    for name, stored in (("finite", patterns[~is_nonfinite]), ("all", patterns)):
        folder = tmp_path / name
        folder.mkdir()
        write_tensors({"w": stored}, folder)
        manifest = bundle_folder.seal(folder, **FIELDS)
        if name == "finite":
            assert bundle_folder.check_weights(folder, manifest)["w"].dtype in FLOATS
        else:
            (problem,) = problems(bundle_folder.check_weights, folder, manifest)
            index = (int(is_nonfinite.nonzero()[0]),)
            fields = {"tensor": "'w'", "count": int(is_nonfinite.sum()), "place": index}
            assert problem == Reason("weights_not_finite", **fields)


def test_check_weights_finds_non_finite_values_in_all_blocks_and_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_folder, "BLOCK_BYTES", 64)
    table = torch.ones(40, 5)
    table[17, 3] = float("nan")
    table[39, 4] = -float("inf")
    scale = torch.ones(9, dtype=torch.float16)
    scale[8] = float("inf")
    weights = {"t": table, "s": scale, "ids": torch.full((9,), -1), "fine": torch.ones(100)}
    write_tensors(weights, tmp_path, 500)
    manifest = bundle_folder.seal(tmp_path, **FIELDS)
    assert set(problems(bundle_folder.check_weights, tmp_path, manifest)) == {
        Reason("weights_not_finite", tensor="'t'", count=2, place=(17, 3)),
        Reason("weights_not_finite", tensor="'s'", count=1, place=(8,)),
    }
    message = refusal_message(bundle_folder.check_weights, tmp_path, manifest)
    assert "'t' has 2 NaN or infinite value(s), the first at [17, 3]" in message


def test_shard_that_shrinks_during_the_check_is_refused(sealed):
    stored = shards.stored_tensors(sealed)["dense.bias"]
    with (sealed / "model.safetensors").open("r+b") as file:
        file.truncate(stored.start + 4)
    message = refusal_message(shards.nonfinite_problem, "dense.bias", stored, bytearray(64))
    assert "became shorter while it was read" in message


@pytest.mark.parametrize(
    ("ties", "problem"),
    [
        (
            {"a": "dense.bia"},
            Reason(
                "tie_not_stored",
                alias="'a'",
                target="'dense.bia'",
                near=("'dense.bias'", "'embed.genres.weight'"),
            ),
        ),
        ({"dense.bias": "embed.user.weight"}, Reason("tie_stored_too", alias="'dense.bias'")),
    ],
)
def test_ties_that_do_not_match_the_shards_are_refused(tmp_path, ties, problem):
    network = Network(architecture=NETWORK.architecture, ties=ties)
    folder = make_bundle(tmp_path / "b", network=network)
    (reason,) = problems(bundle_folder.check_weights, folder, bundle_folder.read(folder))
    assert reason == problem


@pytest.mark.parametrize(
    ("table", "modules", "problem"),
    [
        (
            "embed.users",
            {},
            HasReason(
                "table_not_stored",
                weight="'embed.users.weight'",
                near=("'embed.user'", "'embed.genres'"),
            ),
        ),
        ("dense.bias", {}, HasReason("table_not_stored", near=("'embed.genres'",))),
        ("flat", {}, HasReason("table_shape", weight="'flat.weight'", shape=(3,))),
        (
            "embed.user",
            {"kind": "table", "format": "int8"},
            HasReason("table_record_unusable", kind="table", rows="None"),
        ),
        (
            "embed.user",
            {"kind": "bag", "format": "x", "settings": {"rows": True}},
            HasReason("table_record_unusable", kind="bag", rows="True"),
        ),
        (
            "embed.user",
            {"kind": "linear", "format": "x", "settings": {"rows": 3}},
            HasReason("table_record_unusable", kind="linear", rows="3"),
        ),
    ],
)
def test_input_with_a_missing_table_is_refused(tmp_path, table, modules, problem):
    inputs = [{"kind": "id", "name": "user", "table": table}]
    signature = Signature.model_validate(SIGNATURE.model_dump() | {"inputs": inputs})
    network = Network(
        architecture=NETWORK.architecture,
        modules={"embed.user": ModuleRecord.model_validate(modules)} if modules else {},
    )
    manifest = bundle_folder.seal(
        make_bundle(tmp_path / "b"), **{**FIELDS, "signature": signature} | {"network": network}
    )
    facts = bundle_folder.check_weights(tmp_path / "b", manifest)
    facts["flat.weight"] = bundle_folder.TensorFact(shape=(3,), dtype="F32", bytes=12)
    fault = refusal_of(bundle_folder.table_rows, facts, manifest)
    assert fault.fields["place"] == "Inputs and weights do not fit"
    (reason,) = fault.fields["problems"]
    assert reason == problem
    assert (reason.fields["input"], reason.fields["table"]) == ("'user'", repr(table))


def test_draft_in_the_guide_is_read_and_its_network_can_be_called(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()
    network, save = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    document = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)[0]  # later ones are excerpts
    (tmp_path / "shop_net.py").write_text(network)
    (tmp_path / "model.json").write_text(document)
    for split in ("train", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(compile(save, "docs/bundle.md", "exec"), {})  # noqa: S102
    draft = bundle_folder.read_draft(tmp_path)
    architecture = draft.network.architecture
    model = network_class(architecture.path, ("shop_net",))(**architecture.config)
    inputs = {
        "user": torch.tensor([1, 2]),
        "history": torch.zeros(2, 5, dtype=torch.int64),
        "tags": torch.tensor([1, 2, 3]),
        "tags_offsets": torch.tensor([0, 1]),
        "prices": torch.ones(2, 2),
    }
    assert set(inputs) == {n for item in draft.signature.inputs for n in tensor_names(item)}
    assert model(**inputs).shape == (2, 1)
    facts = {name: stored.fact for name, stored in shards.stored_tensors(tmp_path).items()}
    assert bundle_folder.table_rows(facts, draft) == {"user": 50, "item": 30, "tags": 8}
    del sys.modules["shop_net"]
