"""Triton repositories: contents of config.pbtxt, warm-up requests, and model folders.

A plan is the file format of TensorRT engines. ``batches`` are the smallest, optimal and largest
batch. ``longest`` is the largest number of values per row of a jagged input. ``USER``, ``PRICE``
and ``TAGS`` are declared inputs: an id, three numbers, and values and lengths of a jagged input. A
part is one graph of a model with several, such as the query tower.

``served_version`` (``tests/triton_configs.py``) returns version 3 of the model ``m``, an ONNX graph
with batches of 1, 64 and 1024 rows and 2 threads, if no argument changes these values.
"""

import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from error_codes import raises_code, raises_value_error
from models import REFERENCES, lower_reference
from pbtxt_reader import parse_message
from triton_configs import (
    PRICE,
    SCORE,
    TAGS,
    USER,
    declared_tensors,
    served_version,
    warmup_requests,
)

from infra.errors import SettingRefused, TritonRefused
from infra.store.object_store import Store
from infra.triton.repository import (
    Tensor,
    config,
    count_models,
    model_store,
    owning_model,
    refuse_overlap,
    triton_name,
    version_in,
)

ALL = (USER, PRICE, *TAGS)


def parsed_config(*inputs: Tensor, **changes: Any) -> dict[str, Any]:
    """Return the parsed configuration of a version; every field is a list of values."""
    return parse_message(config(served_version(*inputs, **changes)).decode())


# --- contents of a configuration ------------------------------------------------------------


def test_config_without_jagged_inputs_enables_batching() -> None:
    message = parsed_config(USER, PRICE)
    assert message["max_batch_size"] == [1024]
    assert message["dynamic_batching"] == [{"max_queue_delay_microseconds": [0]}]
    assert message["input"] == [
        {
            "name": ["user"],
            "data_type": ["TYPE_INT64"],
            "dims": [1],
            "reshape": [{"shape": []}],
        },
        {"name": ["price"], "data_type": ["TYPE_FP32"], "dims": [3]},
    ]
    assert message["output"][0] == {
        "name": ["score"],
        "data_type": ["TYPE_FP32"],
        "dims": [1],
        "reshape": [{"shape": []}],
    }


def test_config_with_a_jagged_input_has_full_shapes_and_no_batching() -> None:
    message = parsed_config(*ALL)
    assert message["max_batch_size"] == [0]
    assert "dynamic_batching" not in message
    assert [item["dims"] for item in message["input"]] == [[-1], [-1, 3], [-1], [-1]]
    assert message["output"][0]["dims"] == [-1]
    assert not any("reshape" in item for item in (*message["input"], *message["output"]))
    assert {tuple(item["batch_size"]) for item in message["model_warmup"]} == {(1,)}


def test_config_of_a_sequence_has_a_dynamic_dimension_and_warm_ups_of_the_longest() -> None:
    items = Tensor(name="items", dtype="int64", shape=(50,), is_dynamic=True)
    mask = Tensor(name="items_mask", dtype="bool", shape=(50,), is_dynamic=True)
    message = parsed_config(USER, items, mask)
    assert message["input"][1:] == [
        {"name": ["items"], "data_type": ["TYPE_INT64"], "dims": [-1]},
        {"name": ["items_mask"], "data_type": ["TYPE_BOOL"], "dims": [-1]},
    ]
    assert "dynamic_batching" in message
    for rows, arrays in warmup_requests(config(served_version(USER, items, mask)).decode()):
        assert arrays["items"].shape == arrays["items_mask"].shape == (rows, 50)


def test_config_contains_version_device_threads_and_origin() -> None:
    message = parsed_config(USER)
    assert (message["name"], message["platform"]) == (["m"], ["onnxruntime_onnx"])
    assert message["version_policy"] == [{"specific": [{"versions": [3]}]}]
    assert message["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    assert message["default_model_filename"] == ["model.onnx"]
    parameters = {
        item["key"][0]: item["value"][0]["string_value"][0] for item in message["parameters"]
    }
    assert parameters == {
        "recpress.model": "m",
        "recpress.version": "3",
        "recpress.order": "b" * 64,
        "recpress.sha256": "a" * 64,
        "intra_op_thread_count": "2",
        "inter_op_thread_count": "1",
    }
    without_threads = parsed_config(USER, threads=None)["parameters"]
    assert not any("thread" in item["key"][0] for item in without_threads)
    assert version_in(config(served_version(USER))) == "3"


def test_config_of_a_tensorrt_plan_names_its_compute_capability() -> None:
    message = parsed_config(
        USER,
        target="tensorrt",
        capability="9.0",
        files={"model-9.0.plan": "model.plan"},
        batches=(2, 8, 32),
    )
    assert message["platform"] == ["tensorrt_plan"]
    assert message["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"]}]
    assert message["cc_model_filenames"] == [{"key": ["9.0"], "value": ["model-9.0.plan"]}]
    assert "default_model_filename" not in message
    assert [item["batch_size"] for item in message["model_warmup"]] == [[2], [8], [32]]
    assert not any("thread" in item["key"][0] for item in message["parameters"])


def test_triton_name_contains_the_part_and_the_target() -> None:
    assert triton_name("m", "onnxruntime") == "m"
    assert triton_name("m", "tensorrt") == "m_tensorrt"
    assert triton_name("m", "onnxruntime", "query") == "m_query"
    assert triton_name("m", "tensorrt", "item") == "m_item_tensorrt"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"outputs": (Tensor(name="score", dtype="bfloat16"),)}, "tensor_type_unknown"),
        ({"target": "tensorrt-rtx"}, "target_not_in_triton"),
        ({"version": 0}, "greater_than_equal"),
        ({"batches": (1, 8, 4)}, "batches_shrink"),
        ({"batches": (0, 8, 8)}, "batches_shrink"),
        ({"name": "a/b"}, "string_pattern_mismatch"),
        ({"files": {}}, "too_short"),
    ],
)
def test_served_version_that_triton_cannot_serve_is_refused(
    changes: dict[str, Any], code: str
) -> None:
    with raises_value_error(code):
        served_version(USER, **changes)


# --- warm-ups -------------------------------------------------------------------------------


def test_warm_ups_have_the_smallest_optimal_and_largest_batch() -> None:
    jagged = dict(warmup_requests(config(served_version(*ALL, batches=(1, 64, 1024))).decode()))
    assert list(jagged) == [1, 64, 1024]
    assert {name: array.shape for name, array in jagged[64].items()} == {
        "user": (64,),
        "price": (64, 3),
        "tags": (5,),  # the last row has the longest list and the others are empty
        "tags_lengths": (64,),
    }
    assert jagged[1]["tags"].dtype == np.int32
    assert list(
        dict(warmup_requests(config(served_version(USER, batches=(1, 1, 1))).decode()))
    ) == [1]
    batched = dict(warmup_requests(config(served_version(USER, PRICE)).decode()))[64]
    assert {name: array.shape for name, array in batched.items()} == {
        "user": (64,),
        "price": (64, 3),
    }


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda item: item.network.__name__)
def test_graph_returns_finite_scores_for_every_warm_up_request(reference: Any) -> None:
    lowered = lower_reference(reference.network.__name__, (), "onnxruntime")
    inputs = declared_tensors(lowered.signature, lowered.lowered.wrapper.rows_of_table)
    text = config(served_version(*inputs, batches=(1, 7, 130))).decode()
    batch_sizes = []
    for rows, arrays in warmup_requests(text):
        scores = _run_graph(lowered.path, arrays)
        assert (scores.shape, scores.dtype) == ((rows,), np.float32)
        assert np.isfinite(scores).all()
        batch_sizes.append(rows)
    assert batch_sizes == [1, 7, 130]
    is_batched = not any(item.longest for item in inputs)
    assert (parse_message(text)["max_batch_size"] == [130]) is is_batched


def test_config_has_the_inputs_and_outputs_of_the_onnx_graph() -> None:
    import onnx

    lowered = lower_reference("Ranker", (), "onnxruntime")
    inputs = declared_tensors(lowered.signature, lowered.lowered.wrapper.rows_of_table)
    message = parse_message(config(served_version(*inputs)).decode())
    onnx_graph = onnx.load(lowered.path).graph
    for items, values in (
        (message["input"], onnx_graph.input),
        (message["output"], onnx_graph.output),
    ):
        assert [item["name"][0] for item in items] == [value.name for value in values]
        for item, value in zip(items, values, strict=True):
            kind = value.type.tensor_type
            sizes = [dim.dim_value or -1 for dim in kind.shape.dim]
            assert (item["dims"], sizes[0]) == (sizes, -1)
            element_types = {
                "TYPE_INT64": onnx.TensorProto.INT64,
                "TYPE_INT32": onnx.TensorProto.INT32,
                "TYPE_FP32": onnx.TensorProto.FLOAT,
            }
            assert kind.elem_type == element_types[item["data_type"][0]]


def _run_graph(path: Path, arrays: dict[str, Any]) -> Any:
    """Return the first output of an ONNX graph."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


# --- folders --------------------------------------------------------------------------------


def test_configuration_of_another_program_is_refused(tmp_path: Path) -> None:
    folder = model_store(str(tmp_path), "m")
    assert owning_model(folder) is None
    folder.write("config.pbtxt", config(served_version(USER)))
    assert owning_model(folder) == "m"
    folder.write("config.pbtxt", b'name: "m"\n')
    with raises_code(TritonRefused, "configuration_foreign"):
        owning_model(folder)


def test_repository_root_contains_only_model_folders(tmp_path: Path) -> None:
    for root in (str(tmp_path / "a b"), (tmp_path / "c").as_uri()):
        model_store(root, "m.1").write("config.pbtxt", b"x")
        _, models = count_models(root)
        assert models == 1
    assert (tmp_path / "a b" / "m.1" / "config.pbtxt").read_bytes() == b"x"
    # The server loads every folder in the root as a model: temporary files must not be there.
    assert [path.name for path in (tmp_path / "a b").iterdir()] == ["m.1"]


def test_repository_that_contains_the_object_store_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a" / "store"))
    for root in (tmp_path / "a", tmp_path / "a" / "store"):
        with raises_code(SettingRefused, "triton_repository_holds_store", store=store.root):
            refuse_overlap(str(root), store)
    refuse_overlap(str(tmp_path / "a" / "store" / "triton"), store)
    refuse_overlap(str(tmp_path / "a" / "sto"), store)
    with raises_code(SettingRefused, "root_scheme_unknown", setting="--to", root="gs://x/y"):
        refuse_overlap("gs://x/y", store, "--to")


# --- Triton's own parser --------------------------------------------------------------------

PARSE = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
message = text_format.Parse(open(sys.argv[1]).read(), ModelConfig())
print(json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None))
"""


@pytest.fixture(scope="module")
def client_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A separate environment with Triton's client, whose protobuf conflicts with our pins."""
    folder = tmp_path_factory.mktemp("client")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    installation = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "tritonclient[grpc]>=2.50"],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    if installation.returncode:
        has_no_index = "No matching distribution" in installation.stderr
        has_no_index |= "connection" in installation.stderr.lower()
        assert has_no_index, installation.stderr
        pytest.skip(f"tritonclient cannot be installed here: {installation.stderr[-300:]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batched", "jagged", "plan"])
def test_config_is_parsed_by_the_definitions_of_tritons_client(
    client_python: Path, kind: str, tmp_path: Path
) -> None:
    import json

    graph = {
        "batched": served_version(USER, PRICE),
        "jagged": served_version(*ALL, name='a "quoted" näme', threads=None),
        "plan": served_version(
            USER, target="tensorrt", capability="8.9", files={"model-8.9.plan": "model.plan"}
        ),
    }[kind]
    path = tmp_path / "config.pbtxt"
    path.write_bytes(config(graph))
    process = subprocess.run(
        [str(client_python), "-c", PARSE, str(path)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    message = json.loads(process.stdout)
    assert message["name"] == graph.name
    assert message["version_policy"] == {"specific": {"versions": ["3"]}}
    assert [item["name"] for item in message["input"]] == [item.name for item in graph.inputs]
    assert message["output"][0]["name"] == SCORE.name
    assert message["parameters"]["recpress.sha256"] == {"string_value": "a" * 64}
    assert [item["batch_size"] for item in message["model_warmup"]] == (
        [1, 1, 1] if kind == "jagged" else [1, 64, 1024]
    )
    first = message["model_warmup"][0]["inputs"]["user"]
    assert first == {"data_type": "TYPE_INT64", "dims": ["1"], "zero_data": True}
    if kind == "jagged":
        assert message["input"][1]["dims"] == ["-1", "3"]
        assert "max_batch_size" not in message  # 0 is the default
    else:
        assert message["max_batch_size"] == 1024
        assert message["input"][0]["reshape"] == {}
        assert "dynamic_batching" in message
    if kind == "plan":
        assert message["cc_model_filenames"] == {"8.9": "model-8.9.plan"}
        assert message["instance_group"][0]["kind"] == "KIND_GPU"
