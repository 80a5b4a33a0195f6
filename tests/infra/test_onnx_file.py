"""Reading ONNX files that are damaged, too large, or name files outside of their folder.

``DraftRefused`` is raised if no draft can be written: the folder that becomes a bundle when it is
packed.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from error_codes import raises_code
from onnx import helper
from onnx.external_data_helper import convert_model_to_external_data
from onnx_graphs import build_model

from infra.bundle.onnx_file import read_onnx
from infra.errors import DraftRefused, OutOfMemory

WEIGHT = np.arange(512, dtype=np.float32).reshape(64, 8)


def lookup(opset: int = 18) -> onnx.ModelProto:
    """Return a model with one table."""
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    return build_model([node], {"ids": np.array([0, 1])}, weights={"table": WEIGHT}, opset=opset)


def write_with_external_data(folder: Path) -> Path:
    """Write a model whose table is in the file ``table.bin``."""
    folder.mkdir()
    model = lookup()
    convert_model_to_external_data(model, location="table.bin", size_threshold=0)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def with_location(path: Path, **entries: Any) -> Path:
    """Change entries of the external data of a model's table."""
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = str(entries.get(entry.key, entry.value))
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_are_read_from_the_file_and_from_external_data(tmp_path: Path) -> None:
    onnx.save(lookup(), tmp_path / "model.onnx")
    for path in (tmp_path / "model.onnx", write_with_external_data(tmp_path / "external")):
        stored = read_onnx(path).graph.initializers["table"].const_value
        assert stored is not None
        assert np.array_equal(stored.numpy(), WEIGHT)
    assert isinstance(stored, ir.ExternalTensor)


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "link.bin", None])
def test_external_data_outside_of_the_folder_is_refused(
    tmp_path: Path, location: str | None
) -> None:
    path = write_with_external_data(tmp_path / "model")
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 4096)
    (path.parent / "link.bin").symlink_to(secret)
    location = location or str(secret)  # None: the absolute path of the secret file
    with raises_code(DraftRefused, "onnx_data_outside", location=location):
        read_onnx(with_location(path, location=location))


def test_external_data_that_is_missing_or_too_short_is_refused(tmp_path: Path) -> None:
    path = write_with_external_data(tmp_path / "model")
    for entries in ({"location": "none.bin"}, {"offset": 8}, {"length": 10**15}, {"location": "."}):
        changed = with_location(path, **{"location": "table.bin", **entries})
        with raises_code(DraftRefused, "onnx_data_missing", name="table"):
            read_onnx(changed)
        with_location(path, location="table.bin", offset=0, length=WEIGHT.nbytes)
    os.truncate(path.parent / "table.bin", 100)
    with raises_code(DraftRefused, "onnx_data_missing", name="table", bytes=WEIGHT.nbytes):
        read_onnx(path)


def test_external_data_of_a_constant_is_checked_too(tmp_path: Path) -> None:
    tensor = helper.make_tensor(
        "value", onnx.TensorProto.FLOAT, [2], np.zeros(2, np.float32).tobytes(), raw=True
    )
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    add = helper.make_node("Add", ["x", "c"], ["y"])
    model = build_model([constant, add], {"x": np.zeros((3, 2), np.float32)})
    value = model.graph.node[0].attribute[0].t
    value.ClearField("raw_data")
    value.data_location = onnx.TensorProto.EXTERNAL
    value.external_data.add(key="location", value="../secret.bin")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with raises_code(DraftRefused, "onnx_data_outside", location="../secret.bin"):
        read_onnx(tmp_path / "model.onnx")


def constant_with_external_data() -> onnx.NodeProto:
    """Return a Constant whose value is in the file ``table.bin``."""
    tensor = onnx.TensorProto(name="value", data_type=onnx.TensorProto.FLOAT, dims=WEIGHT.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="table.bin")
    return helper.make_node("Constant", [], ["c"], value=tensor)


def test_external_data_of_a_function_is_read_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lookup()
    model.graph.ClearField("initializer")
    model.graph.node[0].CopyFrom(helper.make_node("Rows", ["ids"], ["y"], domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))
    nodes = [constant_with_external_data(), helper.make_node("Gather", ["c", "ids"], ["y"])]
    imports = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("own", "Rows", ["ids"], ["y"], nodes, imports))
    path = tmp_path / "model" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(model.SerializeToString())
    (path.parent / "table.bin").write_bytes(WEIGHT.tobytes())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "table.bin").write_bytes((WEIGHT + 1).tobytes())
    monkeypatch.chdir(elsewhere)
    (function,) = read_onnx(path).functions.values()
    stored = next(iter(function)).attributes["value"].as_tensor()
    assert np.array_equal(stored.numpy(), WEIGHT)


def test_external_data_counts_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_location(write_with_external_data(tmp_path / "model"), length=2**33)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].dims[0] = 2**33 // (4 * WEIGHT.shape[1])
    path.write_bytes(model.SerializeToString())
    os.truncate(path.parent / "table.bin", 2**33)  # a sparse file
    # Enough for model.onnx, but not for the table of 8 GiB.
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "6000")
    with pytest.raises(OutOfMemory):
        read_onnx(path)


def damaged(name: str) -> bytes:
    """Return the bytes of a file that is no usable model."""
    whole = lookup().SerializeToString()
    if name == "undefined":
        model = lookup()
        model.graph.node[0].input[1] = "nothing"
        return model.SerializeToString()
    if name == "short_weight":
        model = lookup()
        model.graph.initializer[0].raw_data = b"123"
        return model.SerializeToString()
    return {
        "empty": b"",
        "text": b"import torch\n" * 30,
        "truncated": whole[: len(whole) // 2],
        "changed": whole.replace(b"Gather", b"\xff\xff\xff\xff\xff\xff"),
    }[name]


@pytest.mark.parametrize(
    "name", ["empty", "text", "truncated", "changed", "undefined", "short_weight"]
)
def test_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(damaged(name))
    with raises_code(DraftRefused, "onnx_unreadable"):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("opset", [6, 26])
def test_unknown_opset_is_refused(tmp_path: Path, opset: int) -> None:
    model = lookup()
    model.opset_import[0].version = opset
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with raises_code(DraftRefused, "onnx_opset", got=opset):
        read_onnx(tmp_path / "model.onnx")


def test_file_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    os.truncate(path, 2**31)  # a sparse file
    with raises_code(DraftRefused, "onnx_too_large", bytes=2**31):
        read_onnx(path)
    os.truncate(path, 2**30)
    monkeypatch.setenv("RECPRESS_MEMORY_MB", "1024")
    with pytest.raises(OutOfMemory):
        read_onnx(path)
