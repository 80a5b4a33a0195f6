"""A Triton model repository: the configuration of a served graph, and where its files lie.

::

    <root>/<model>/<version>/...    what the server loads; never changed once it is complete
    <root>/<model>/config.pbtxt     which version is served; written last

A server in poll mode reads whatever lies there, so the configuration never names a version whose
files are not complete. Each model has a ``Store`` of its own, rooted at its folder: a store's
temporary files then lie where the server looks for versions and skips what is no number, not where
it looks for models.

Triton's ``tensorrt`` backend loads plans of TensorRT. Engines of TensorRT-RTX are another format
that no backend of Triton loads: there is no ``Target`` for them here.
"""

import re
from typing import Any, Literal, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from compressors.contracts import Artifact, Frozen, Sha256
from compressors.contracts.value_errors import value_error
from infra.errors import ArtifactMissing, SettingRefused, TritonRefused
from infra.store.object_store import FileEntry, Store
from infra.triton.pbtxt import Enum, entries, written

Target = Literal["onnxruntime", "tensorrt"]

CONFIG = "config.pbtxt"
PLATFORMS: dict[Target, str] = {"onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}
TYPES = {"int64": "TYPE_INT64", "int32": "TYPE_INT32", "float32": "TYPE_FP32"}
QUEUE_MICROSECONDS = 0
"""How long a request may wait for others to share its batch.

Zero: a request is never held back, and whatever queues up while the model is busy is answered
together. A longer wait buys throughput with latency, which nobody measured for this model.
"""

_MARK = "# Written by recpress for model "
_VERSIONS = re.compile(r"versions: \[([0-9]+)\]")


class Tensor(Frozen):
    """An input or output of a graph.

    ``shape`` leaves out the first dimension. That is the rows of a request, or, where ``longest``
    is given, all values of all rows end to end, at most so many a row.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    longest: int | None = Field(None, ge=1)


class ServedVersion(Frozen):
    """One graph of one published version: one Triton model.

    Args:
        name: the Triton model's name.
        model: the registered model it belongs to.
        version: the registry's version number, which becomes Triton's.
        order: digest of the order that made it.
        artifact: what its files are copied from.
        files: path in Triton's version folder -> path in the artifact; the graph or plan is last.
        batches: smallest batch, the best one, the largest a request may have.
        threads: threads of one call, where they are known.
        capability: the compute capability a plan was built for.
    """

    name: str = Field(pattern=r"^[^/:\\\x00-\x1f]+$")
    model: str
    version: int = Field(ge=1)
    order: Sha256
    target: Target
    artifact: Artifact
    files: dict[str, str] = Field(min_length=1)
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    outputs: tuple[Tensor, ...] = Field(min_length=1)
    batches: tuple[int, int, int]
    threads: int | None = Field(None, ge=1)
    capability: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        low, best, high = self.batches
        if not 1 <= low <= best <= high:
            raise value_error("batches_shrink", got=self.batches)
        for tensor in (*self.inputs, *self.outputs):
            if tensor.dtype not in TYPES:
                raise value_error(
                    "tensor_type_unknown",
                    tensor=tensor.name,
                    dtype=tensor.dtype,
                    dtypes=list(TYPES),
                )
        return self

    @property
    def graph(self) -> str:
        """The file Triton is told to load."""
        return list(self.files)[-1]

    @property
    def batched(self) -> bool:
        """Whether every input's first dimension is the rows, so that requests can be joined."""
        return all(tensor.longest is None for tensor in self.inputs)


def triton_name(model: str, target: Target, part: str = "") -> str:
    """What one graph of a model is called in Triton.

    Args:
        model: the registered model's name.
        target: TensorRT plans stand beside the ONNX graph, under a name of their own.
        part: which of several graphs (``query``, ``item``); empty for a model's only one.
    """
    return "_".join(filter(None, (model, part, "tensorrt" if target == "tensorrt" else "")))


# --- the configuration -----------------------------------------------------------------------


def config(served: ServedVersion) -> bytes:
    """``config.pbtxt`` of one graph: complete, so that the server has nothing to guess."""
    low, best, high = served.batches
    message: dict[str, Any] = {
        "name": served.name,
        "platform": PLATFORMS[served.target],
        "max_batch_size": high if served.batched else 0,
        "version_policy": {"specific": {"versions": [served.version]}},
        "input": [_tensor(item, served.batched) for item in served.inputs],
        "output": [_tensor(item, served.batched) for item in served.outputs],
    }
    kind = "KIND_CPU" if served.target == "onnxruntime" else "KIND_GPU"
    message["instance_group"] = [{"count": 1, "kind": Enum(kind)}]
    if served.batched:
        message["dynamic_batching"] = {"max_queue_delay_microseconds": QUEUE_MICROSECONDS}
    if served.capability is not None:
        message["cc_model_filenames"] = entries({served.capability: served.graph})
    else:
        message["default_model_filename"] = served.graph
    message["model_warmup"] = [_warmup(served, rows) for rows in sorted({low, best, high})]
    message["parameters"] = entries(
        {key: {"string_value": value} for key, value in _parameters(served).items()}
    )
    lines = (
        f"{_MARK}{served.model}.\n"
        "# It follows the registry's champion and is written anew with each promotion.\n"
    )
    return (lines + written(message)).encode()


def _parameters(served: ServedVersion) -> dict[str, str]:
    """Threads for the backend, and where this came from for whoever asks the server."""
    found = {
        "recpress.model": served.model,
        "recpress.version": str(served.version),
        "recpress.order": served.order,
        "recpress.sha256": served.artifact.sha256,
    }
    if served.target == "onnxruntime" and served.threads is not None:
        # Triton answers several requests at once with several instances, not with more threads.
        found["intra_op_thread_count"] = str(served.threads)
        found["inter_op_thread_count"] = "1"
    return found


def _tensor(tensor: Tensor, batched: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": tensor.name, "data_type": Enum(TYPES[tensor.dtype])}
    if not batched:
        return fields | {"dims": [-1, *tensor.shape]}
    if tensor.shape:
        return fields | {"dims": list(tensor.shape)}
    # Triton has no tensor without dimensions: callers send (rows, 1), the graph gets (rows,).
    return fields | {"dims": [1], "reshape": {"shape": []}}


def _warmup(served: ServedVersion, rows: int) -> dict[str, Any]:
    """A request of zeros. 0 is an id of every table, and lists that all begin at 0 are valid."""
    inputs = {
        name: {
            "data_type": Enum(TYPES[dtype]),
            "dims": list(shape[1:] or (1,)) if served.batched else list(shape),
            "zero_data": True,
        }
        for name, dtype, shape in warmup_shapes(served.inputs, rows)
    }
    return {
        "name": f"{rows} rows",
        "batch_size": rows if served.batched else 1,
        "inputs": entries(inputs),
    }


def warmup_shapes(
    inputs: tuple[Tensor, ...], rows: int
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Name, type and shape of every array of zeros that warms a graph up at so many rows.

    Of a jagged input the last row gets one list of the longest kind and the others none: a graph
    pads to the longest list whatever the lists are, so this costs what any such batch costs.
    """
    return tuple((item.name, item.dtype, (item.longest or rows, *item.shape)) for item in inputs)


# --- the folders -----------------------------------------------------------------------------


def place(root: str, name: str, setting: str = "RECPRESS_TRITON") -> Store:
    """The folder of one Triton model in a repository.

    Raises:
        SettingRefused: ``root`` is no folder and no ``s3://bucket/prefix``.
    """
    base = Store(root, setting).root
    return Store(f"{base}/{quote(name) if base.startswith('file:') else name}", setting)


def contents(root: str, setting: str = "RECPRESS_TRITON") -> tuple[str, int]:
    """A repository's own name for itself, and how many models are configured in it."""
    base = Store(root, setting)
    return base.root, sum(
        key.count("/") == 1 and key.endswith(f"/{CONFIG}") for key in base.keys("")
    )


def refuse_overlap(root: str, store: Store, setting: str = "RECPRESS_TRITON") -> None:
    """Refuse a repository in which the server would take folders of the object store for models.

    Raises:
        SettingRefused: the store lies in the repository, or is it.
    """
    base = Store(root, setting).root
    if f"{store.root}/".startswith(f"{base}/"):
        raise SettingRefused(
            "triton_repository_holds_store", setting=setting, repository=base, store=store.root
        )


def owner(home: Store) -> str | None:
    """The registered model a Triton model follows; None if there is no configuration.

    Raises:
        TritonRefused: somebody else wrote the configuration.
    """
    body = current(home)
    if body is None:
        return None
    first = body.decode(errors="replace").partition("\n")[0]
    if not first.startswith(_MARK):
        raise TritonRefused("configuration_foreign", path=f"{home.root}/{CONFIG}")
    return first.removeprefix(_MARK).removesuffix(".")


def current(home: Store) -> bytes | None:
    """The configuration that lies there now."""
    try:
        return home.read(CONFIG)
    except ArtifactMissing:
        return None


def version_in(body: bytes) -> str | None:
    """The version a configuration of ours serves."""
    found = _VERSIONS.search(body.decode(errors="replace"))
    return found[1] if found else None


def stage(home: Store, source: Store, served: ServedVersion) -> tuple[str, ...]:
    """Put a version's files in place, each verified; what is there and right stays untouched.

    Returns:
        The keys that had to be written.

    Raises:
        TritonRefused: the folder belongs to another model or program, or serves another order under
            this version's number.
        ArtifactMissing, ArtifactDamaged: as ``Store.chunks``.
    """
    if (held := owner(home)) not in (None, served.model):
        raise TritonRefused("folder_of_other_model", folder=home.root, model=held, got=served.model)
    body = (current(home) or b"").decode(errors="replace")
    if version_in(body.encode()) == str(served.version) and _names_other_order(body, served):
        raise TritonRefused(
            "version_of_other_order",
            folder=home.root,
            version=served.version,
            order=served.order,
            model=served.model,
        )
    wrong = faults(home, source, served)
    for key in wrong:
        entry = _entries(source, served)[key]
        home.upload(key, entry.bytes, source.chunks(served.artifact, entry.path))
    return tuple(wrong)


def _names_other_order(body: str, served: ServedVersion) -> bool:
    return '"recpress.order"' in body and served.order not in body


def faults(home: Store, source: Store, served: ServedVersion) -> dict[str, str]:
    """Files that are not what was published: key -> ``missing`` or ``changed``. Reads all bytes."""
    chunk_bytes = source.manifest(served.artifact).chunk_bytes
    there = set(home.keys(f"{served.version}/"))
    found = {}
    for key, entry in _entries(source, served).items():
        if key not in there:
            found[key] = "missing"
        elif not home.holds(key, entry, chunk_bytes):
            found[key] = "changed"
    return found


def follows(home: Store, source: Store, served: ServedVersion) -> bool:
    """Whether the configuration and the sizes of the files are this version's.

    The configuration names the artifact and is written only after its files were verified, so
    nothing is read but the configuration and one listing.
    """
    there = home.sizes(f"{served.version}/")
    return current(home) == config(served) and all(
        there.get(key) == entry.bytes for key, entry in _entries(source, served).items()
    )


def point(home: Store, served: ServedVersion) -> None:
    """Let the server load this version: the one write it acts on."""
    home.write(CONFIG, config(served))


def keys(source: Store, served: ServedVersion) -> tuple[str, ...]:
    """Where a version's files lie in its Triton model's folder; the graph is last."""
    return tuple(_entries(source, served))


def _entries(source: Store, served: ServedVersion) -> dict[str, FileEntry]:
    held = {entry.path: entry for entry in source.manifest(served.artifact).files}
    found = {}
    for name, path in served.files.items():
        if path not in held:
            raise ArtifactMissing("artifact_file_missing", uri=served.artifact.uri, path=path)
        found[f"{served.version}/{name}"] = held[path]
    return found
