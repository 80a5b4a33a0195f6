"""Write a Triton model repository: the folder from which a Triton server loads its models.

A Triton model is one graph of a registered model. Its folder contains its versions.

::

    <root>/<model>/<version>/...    the files that the server loads; never changed once complete
    <root>/<model>/config.pbtxt     selects the served version; written last

A server in poll mode reads the folder at any time, so the configuration never names a version whose
files are incomplete. Each Triton model has a separate ``Store``, rooted at ``<root>/<model>``; the
parameter ``folder`` of the functions is this store. Its temporary files are therefore next to the
version folders, where the server ignores names that are not numbers. Temporary files in ``<root>``
would be loaded as models.

A target declares the Triton backend that serves its files (``TritonBackend``). No backend loads
engines of TensorRT-RTX, whose format differs from that of TensorRT engines ("plans").
"""

import re
from typing import Any, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from compressors.contracts import TARGETS, Artifact, Frozen, Sha256
from compressors.contracts import target as target_named
from compressors.contracts.targets import TritonBackend
from compressors.contracts.value_errors import value_error
from infra.errors import ArtifactMissing, SettingRefused, TritonRefused
from infra.store.object_store import FileEntry, Store
from infra.triton.pbtxt import Enum, entries, format_message

CONFIG = "config.pbtxt"
TYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "bool": "TYPE_BOOL",
}
QUEUE_MICROSECONDS = 0
"""How long Triton delays a request to batch it with others, in microseconds.

With 0, requests that arrive while the model is busy are still batched. A delay increases both
throughput and latency; its effect was not measured.
"""

# Start of the first line of a configuration that recpress wrote; the model's name follows.
_MARK = "# Written by recpress for model "
_VERSIONS = re.compile(r"versions: \[([0-9]+)\]")


class Tensor(Frozen):
    """One input or output of a graph.

    ``shape`` omits the first dimension. If ``longest`` is None, the first dimension is the rows of
    a request. Otherwise the input is jagged: the first dimension is the concatenated values of all
    rows, at most ``longest`` per row. If ``is_dynamic``, ``shape`` is the largest: requests may be
    smaller.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    longest: int | None = Field(None, ge=1)
    is_dynamic: bool = False

    @property
    def dims(self) -> list[int]:
        """``shape`` with -1 for each dimension whose size differs between requests."""
        return [-1] * len(self.shape) if self.is_dynamic else list(self.shape)


class ServedVersion(Frozen):
    """One graph of one published version, which Triton serves as one model.

    Args:
        name: the Triton model's name.
        model: the registered model it belongs to.
        version: the registry's version number, which becomes Triton's.
        order: digest of the order that produced it.
        target: the runtime that it was lowered for.
        artifact: the artifact from which its files are copied.
        files: path in Triton's version folder -> path in the artifact. The file that Triton loads,
            a graph or a TensorRT plan, is last.
        inputs: the inputs of the graph.
        outputs: the outputs of the graph.
        batches: smallest, optimal and largest number of rows of a request.
        threads: threads of one call; None leaves it to Triton.
        capability: the compute capability for which a TensorRT plan was built.
    """

    name: str = Field(pattern=r"^[^/:\\\x00-\x1f]+$")
    model: str
    version: int = Field(ge=1)
    order: Sha256
    target: str
    artifact: Artifact
    files: dict[str, str] = Field(min_length=1)
    inputs: tuple[Tensor, ...] = Field(min_length=1)
    outputs: tuple[Tensor, ...] = Field(min_length=1)
    batches: tuple[int, int, int]
    threads: int | None = Field(None, ge=1)
    capability: str | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.target not in servable_targets():
            raise value_error(
                "target_not_in_triton", target=self.target, targets=list(servable_targets())
            )
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
        """The name of the file that Triton loads."""
        return list(self.files)[-1]

    @property
    def batched(self) -> bool:
        """Whether every input's first dimension is the rows, so that Triton can batch requests."""
        return all(tensor.longest is None for tensor in self.inputs)


def servable_targets() -> tuple[str, ...]:
    """Return the names of the targets that Triton can serve."""
    return tuple(item.name for item in TARGETS.values() if item.triton is not None)


def backend(target: str) -> TritonBackend:
    """Return the Triton backend that serves a target.

    Raises:
        ValueError: Triton cannot serve the target.
    """
    triton = target_named(target).triton
    if triton is None:
        raise ValueError(f"Triton cannot serve target {target!r}")
    return triton


def triton_name(model: str, target: str, part: str = "") -> str:
    """Return the Triton name of one graph of a model.

    Args:
        model: the registered model's name.
        target: the target of the graph; it is part of the name, so that one repository can serve
            an ONNX graph and a TensorRT plan of the same model.
        part: which graph of a model with several (``query``, ``item``); empty if there is one.
    """
    return "_".join(filter(None, (model, part, backend(target).suffix)))


# --- the configuration -----------------------------------------------------------------------


def config(served: ServedVersion) -> bytes:
    """Format the complete ``config.pbtxt`` of one graph; the server infers no field."""
    low, best, high = served.batches
    message: dict[str, Any] = {
        "name": served.name,
        "platform": backend(served.target).platform,
        "max_batch_size": high if served.batched else 0,
        "version_policy": {"specific": {"versions": [served.version]}},
        "input": [_describe_tensor(item, served.batched) for item in served.inputs],
        "output": [_describe_tensor(item, served.batched) for item in served.outputs],
    }
    kind = Enum(backend(served.target).instance_kind)
    message["instance_group"] = [{"count": 1, "kind": kind}]
    if served.batched:
        message["dynamic_batching"] = {"max_queue_delay_microseconds": QUEUE_MICROSECONDS}
    if served.capability is not None:
        message["cc_model_filenames"] = entries({served.capability: served.graph})
    else:
        message["default_model_filename"] = served.graph
    message["model_warmup"] = [_build_warmup(served, rows) for rows in sorted({low, best, high})]
    message["parameters"] = entries(
        {key: {"string_value": value} for key, value in _build_parameters(served).items()}
    )
    header = (
        f"{_MARK}{served.model}.\n"
        "# It follows the registry's champion and is written again with each promotion.\n"
    )
    return (header + format_message(message)).encode()


def _build_parameters(served: ServedVersion) -> dict[str, str]:
    """Return the backend's thread counts, and the model's origin for clients that query it."""
    parameters = {
        "recpress.model": served.model,
        "recpress.version": str(served.version),
        "recpress.order": served.order,
        "recpress.sha256": served.artifact.sha256,
    }
    if backend(served.target).has_threads and served.threads is not None:
        # Triton runs requests in parallel with several instances, not with more threads.
        parameters["intra_op_thread_count"] = str(served.threads)
        parameters["inter_op_thread_count"] = "1"
    return parameters


def _describe_tensor(tensor: Tensor, batched: bool) -> dict[str, Any]:
    """Return the configuration's entry of one input or output."""
    fields: dict[str, Any] = {"name": tensor.name, "data_type": Enum(TYPES[tensor.dtype])}
    if not batched:
        return fields | {"dims": [-1, *tensor.dims]}
    if tensor.shape:
        return fields | {"dims": tensor.dims}
    # Triton requires a dimension after the batch: clients send (rows, 1), the graph gets (rows,).
    return fields | {"dims": [1], "reshape": {"shape": []}}


def _build_warmup(served: ServedVersion, rows: int) -> dict[str, Any]:
    """Build a warm-up request of zeros, which are valid ids and valid starts of jagged rows.

    Besides the values, a jagged input has a second tensor with the start of each row in the values,
    or with the lengths of the rows, from which the graph computes the starts.
    """
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
    """Return name, type and shape of the arrays of a warm-up request with ``rows`` rows.

    In a jagged input the last row has the maximum length and the other rows are empty. The graph
    pads all rows to the longest one, so this costs as much as a batch of rows of maximum length.
    """
    return tuple((item.name, item.dtype, (item.longest or rows, *item.shape)) for item in inputs)


# --- the folders -----------------------------------------------------------------------------


def model_store(root: str, name: str, setting: str = "RECPRESS_TRITON") -> Store:
    """Return the store of one Triton model's folder in a repository.

    Args:
        root: the repository: a folder, or ``s3://bucket/prefix``.
        name: the Triton model's name.
        setting: the setting or option that contains ``root``, for errors.

    Raises:
        SettingRefused: ``root`` is neither a folder nor ``s3://bucket/prefix``.
    """
    uri = Store(root, setting).root
    return Store(f"{uri}/{quote(name) if uri.startswith('file:') else name}", setting)


def count_models(root: str, setting: str = "RECPRESS_TRITON") -> tuple[str, int]:
    """Return a repository's URI and the number of models configured in it."""
    repository = Store(root, setting)
    # The key of a model's configuration is ``<model>/config.pbtxt``.
    return repository.root, sum(
        key.count("/") == 1 and key.endswith(f"/{CONFIG}") for key in repository.keys("")
    )


def refuse_overlap(root: str, store: Store, setting: str = "RECPRESS_TRITON") -> None:
    """Raise if the server would load folders of the object store as models.

    Raises:
        SettingRefused: the store is inside the repository, or is the repository.
    """
    uri = Store(root, setting).root
    if f"{store.root}/".startswith(f"{uri}/"):
        raise SettingRefused(
            "triton_repository_holds_store", setting=setting, repository=uri, store=store.root
        )


def owning_model(folder: Store) -> str | None:
    """Return the registered model that a Triton model belongs to; None without a configuration.

    Raises:
        TritonRefused: another program or person wrote the configuration.
    """
    body = read_config(folder)
    if body is None:
        return None
    first = body.decode(errors="replace").partition("\n")[0]
    if not first.startswith(_MARK):
        raise TritonRefused("configuration_foreign", path=f"{folder.root}/{CONFIG}")
    return first.removeprefix(_MARK).removesuffix(".")


def read_config(folder: Store) -> bytes | None:
    """Read the current ``config.pbtxt``; None if there is none."""
    try:
        return folder.read(CONFIG)
    except ArtifactMissing:
        return None


def version_in(body: bytes) -> str | None:
    """Return the version number that a ``config.pbtxt`` selects; None if it selects none."""
    match = _VERSIONS.search(body.decode(errors="replace"))
    return match[1] if match else None


def copy_version(folder: Store, source: Store, served: ServedVersion) -> tuple[str, ...]:
    """Copy a version's files and verify each; correct files are not written again.

    Args:
        folder: the store of the Triton model's folder.
        source: the object store that contains the artifact.
        served: the version.

    Returns:
        The keys that were written.

    Raises:
        TritonRefused: the folder belongs to another model or program, or it serves a version with
            the same number of another order.
        ArtifactMissing, ArtifactDamaged: a file of the version is missing or damaged in the store.
    """
    if (owner_model := owning_model(folder)) not in (None, served.model):
        raise TritonRefused(
            "folder_of_other_model", folder=folder.root, model=owner_model, got=served.model
        )
    body = (read_config(folder) or b"").decode(errors="replace")
    if version_in(body.encode()) == str(served.version) and _is_of_other_order(body, served):
        raise TritonRefused(
            "version_of_other_order",
            folder=folder.root,
            version=served.version,
            order=served.order,
            model=served.model,
        )
    problems = find_wrong_files(folder, source, served)
    for key in problems:
        entry = _map_entries(source, served)[key]
        folder.upload(key, entry.bytes, source.chunks(served.artifact, entry.path))
    return tuple(problems)


def _is_of_other_order(body: str, served: ServedVersion) -> bool:
    """Return whether a configuration is of another order than a version."""
    return '"recpress.order"' in body and served.order not in body


def find_wrong_files(folder: Store, source: Store, served: ServedVersion) -> dict[str, str]:
    """Compare a version's files with those of its artifact; read all bytes.

    Args:
        folder: the store of the Triton model's folder.
        source: the object store that contains the artifact.
        served: the version.

    Returns:
        The key of each wrong file -> ``missing`` or ``changed``.
    """
    chunk_bytes = source.manifest(served.artifact).chunk_bytes
    existing = set(folder.keys(f"{served.version}/"))
    problems = {}
    for key, entry in _map_entries(source, served).items():
        if key not in existing:
            problems[key] = "missing"
        elif not folder.has_content(key, entry, chunk_bytes):
            problems[key] = "changed"
    return problems


def is_current(folder: Store, source: Store, served: ServedVersion) -> bool:
    """Return whether the configuration and the file sizes agree with this version.

    Contents of files are not compared, because the configuration contains the artifact's digest and
    is written only after the files were verified.
    """
    sizes = folder.sizes(f"{served.version}/")
    return read_config(folder) == config(served) and all(
        sizes.get(key) == entry.bytes for key, entry in _map_entries(source, served).items()
    )


def write_config(folder: Store, served: ServedVersion) -> None:
    """Write the configuration, which makes the server load this version."""
    folder.write(CONFIG, config(served))


def version_keys(source: Store, served: ServedVersion) -> tuple[str, ...]:
    """Return the keys of a version's files in its Triton model's folder; the graph is last."""
    return tuple(_map_entries(source, served))


def _map_entries(source: Store, served: ServedVersion) -> dict[str, FileEntry]:
    """Return key in the Triton model's folder -> entry of that file in the artifact's manifest."""
    published = {entry.path: entry for entry in source.manifest(served.artifact).files}
    entries_by_key = {}
    for name, path in served.files.items():
        if path not in published:
            raise ArtifactMissing("artifact_file_missing", uri=served.artifact.uri, path=path)
        entries_by_key[f"{served.version}/{name}"] = published[path]
    return entries_by_key
