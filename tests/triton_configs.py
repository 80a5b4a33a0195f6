"""Triton configurations for tests, and what a server reads from them: warm-ups and versions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pbtxt_reader import parse_message

from compressors.contracts import Artifact, JaggedBag, Signature
from compressors.core.random_inputs import generate_inputs
from compressors.lower.serving_wrapper import input_names
from infra.triton.repository import ServedVersion, Tensor

DTYPES = {
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}
MISSING_ARTIFACT = Artifact(uri="file:///nowhere", sha256="a" * 64, bytes=1)
USER = Tensor(name="user", dtype="int64")
PRICE = Tensor(name="price", dtype="float32", shape=(3,))
TAGS = (
    Tensor(name="tags", dtype="int32", longest=5),  # a jagged bag of at most 5 ids per row
    Tensor(name="tags_lengths", dtype="int64"),
)
SCORE = Tensor(name="score", dtype="float32")


def served_version(*inputs: Tensor, **more: Any) -> ServedVersion:
    """Return a ``ServedVersion`` with these inputs and default values in all other fields."""
    fields: dict[str, Any] = {
        "name": "m",
        "model": "m",
        "version": 3,
        "order": "b" * 64,
        "target": "onnxruntime",
        "artifact": MISSING_ARTIFACT,
        "files": {"model.onnx": "model.onnx"},  # path in Triton's folder: path in the artifact
        "inputs": inputs,
        "outputs": (SCORE,),
        "batches": (1, 64, 1024),  # the measured batch sizes
        "threads": 2,
    }
    return ServedVersion(**fields | more)


def declared_tensors(signature: Signature, rows_of_table: dict[str, int]) -> tuple[Tensor, ...]:
    """Return the inputs that the lowering of a signature declares."""
    arrays_of_inputs = generate_inputs(signature, rows_of_table, 3)
    longest = {item.name: item.shape[0] for item in signature.inputs if isinstance(item, JaggedBag)}
    return tuple(
        Tensor(
            name=name,
            dtype=str(arrays_of_inputs[name].dtype).removeprefix("torch."),
            shape=tuple(arrays_of_inputs[name].shape[1:]),
            longest=longest.get(name),
        )
        for name in input_names(signature)
    )


def warmup_requests(config: str) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Yield for each warm-up the requested rows and the input arrays that the graph receives.

    A request with ``batch_size`` n is n requests of one row each, which the server reshapes and
    then concatenates along the first dimension.
    """
    message = parse_message(config)
    batched = message["max_batch_size"][0] > 0
    reshaped = {
        item["name"][0]: item["reshape"][0]["shape"]
        for item in message["input"]
        if "reshape" in item
    }
    types = {item["name"][0]: item["data_type"][0] for item in message["input"]}
    for warmup in message["model_warmup"]:
        arrays = {}
        count = warmup["batch_size"][0]
        for entry in warmup["inputs"]:
            name, value = entry["key"][0], entry["value"][0]
            assert value["data_type"] == [types[name]]
            assert value["zero_data"] == ["true"]
            dims = reshaped.get(name, value["dims"])
            shape = (count, *dims) if batched else tuple(dims)
            arrays[name] = np.zeros(shape, DTYPES[types[name]])
        yield int(warmup["name"][0].split()[0]), arrays  # the name is such as "64 rows"


def loaded_version(repository: Path, model: str = "m") -> tuple[str, bytes] | None:
    """Return version and bytes that a server loads at its start; None without a configuration.

    Fails if the configuration names a missing file, because the server would serve nothing.
    """
    config = repository / model / "config.pbtxt"
    if not config.exists():
        return None
    message = parse_message(config.read_text())
    assert message["name"] == [model]
    (version,) = message["version_policy"][0]["specific"][0]["versions"]
    file = message.get("default_model_filename", ["model.plan"])[0]
    return str(version), (repository / model / str(version) / file).read_bytes()
