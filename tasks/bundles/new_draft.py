"""Write the draft of a bundle from a trained network and rows of the data.

The network is in a user's module or in an ONNX file.

The network is called with rows of the data (``compressors/inspection``) to derive its inputs and
outputs, and its arguments are recorded while it is constructed (``infra/bundle/live_model.py``).
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressors.contracts import (
    ITEMS,
    Architecture,
    Frozen,
    MatrixInput,
    Network,
    Signature,
    all_tables,
    is_out_of_memory,
)
from compressors.core.runner import rows_of_tables
from compressors.core.scores import call_network
from compressors.core.state.argument_values import decode_arguments
from compressors.core.state.module_state import load, tensors_of
from compressors.core.state.tensor_files import SINGLE
from compressors.errors.compression import CompressionError
from compressors.errors.construction import ConstructionFailed
from compressors.inspection.inputs import DerivedInputs, derive_inputs
from compressors.inspection.lookups import same_outputs
from compressors.inspection.outputs import derive_outputs, named_scores
from compressors.inspection.sample import ColumnKind, Sample, SampleColumn
from compressors.onnx_network.network import OnnxNetwork
from infra.bundle.architecture import network_class
from infra.bundle.bundle_folder import MANIFEST, SCHEMA_VERSION, Draft, SplitName, read_draft
from infra.bundle.json_reader import parse
from infra.bundle.live_model import class_path, describe_architecture, import_network
from infra.data.data_sample import OTHER, ColumnSummary, data_files, summarize_columns
from infra.errors import BundleRefused, DraftRefused, Refused
from infra.settings import load_settings
from infra.store.disk import translate_input_errors
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import import_architecture
from tasks.bundles.onnx_models import load_onnx, require_onnx_scores

SPLITS = tuple(split for split in get_args(SplitName) if split != ITEMS)
"""The splits that are looked for in a data folder; ``items`` belongs to retrieval models only."""


class DraftRequest(Frozen):
    """What the user says about a trained network.

    Attributes:
        folder: the new folder of the draft.
        model: a network, a function that returns one, or with ``weights`` its class, in the form
            ``module:name``; None with ``onnx``.
        data: folder with the splits.
        labels: column with the labels by output, in the order of the outputs.
        metric: the metric that decides quality; None for the default of the task kind.
        group: column that groups rows.
        time: column with the time of a row.
        inputs: columns by argument of the network, where they have other names.
        name: name of the bundle; None for the name of the class.
        version: version of the bundle.
        weights: safetensors file with the weights, if ``model`` is a class.
        config: keyword arguments of the class, as JSON, with ``weights``.
        onnx: ONNX file with the network, in place of ``model``.
    """

    folder: Path
    model: str | None
    data: Path
    labels: dict[str, str]
    metric: str | None = None
    group: str | None = None
    time: str | None = None
    inputs: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    name: str | None = None
    version: str = "1"
    weights: Path | None = None
    config: str = "{}"
    onnx: Path | None = None

    @property
    def source(self) -> str:
        """What the network is read from."""
        return self.model or str(self.onnx)


@dataclass(frozen=True)
class NewDraft:
    """A draft that was written.

    Attributes:
        folder: its folder.
        draft: its ``model.json``.
        rows_of_table: rows of each table that an input reads, by its path.
        reasons: by input, why it has its kind.
        unused: columns that fill an input and change no output.
        weight_bytes: size of the weights' file.
    """

    folder: Path
    draft: Draft
    rows_of_table: dict[str, int]
    reasons: Mapping[str, str]
    unused: tuple[str, ...]
    weight_bytes: int


def label_candidates(data: Path) -> tuple[str, ...]:
    """Return the columns of numbers in a data folder, those with only 0 and 1 first.

    Raises:
        DraftRefused, DataRefused: the data is missing or cannot be read.
    """
    with translate_input_errors(data):
        sample = _sample(summarize_columns(data_files(data, SPLITS)))
    numbers = [column for column in sample.values() if not column.is_list]
    binary = [
        column.name
        for column in numbers
        if column.is_integer and (column.low, column.high) == (0, 1)
    ]
    return (*binary, *(column.name for column in numbers if column.name not in binary))


def new_draft(request: DraftRequest) -> NewDraft:
    """Derive the description of a trained network, and write it with the weights as a draft.

    Raises:
        BundleRefused: the module is not allowed or cannot be imported, or a field is invalid.
        DraftRefused: the network, its arguments, the data or the folder cannot be used.
        InspectionFailed: an input or output cannot be derived.
        DataRefused: the data cannot be read.
    """
    # Standard output has only the result of the command, not what the user's constructors print.
    with translate_input_errors(request.folder), redirect_stdout(sys.stderr):
        return _new_draft(request)


def _new_draft(request: DraftRequest) -> NewDraft:
    _require_one_source(request)
    if request.folder.exists() and any(request.folder.iterdir()):
        raise DraftRefused("folder_not_empty", folder=str(request.folder))
    files = data_files(request.data, SPLITS)
    summaries = summarize_columns(files)
    _require_columns(request, summaries)
    sample = _sample(summaries)
    module, architecture = _imported(request)
    _require_only_tensors(module)
    tensors, ties = tensors_of(module)
    network = Network(architecture=architecture, ties=ties)
    excluded = (*request.labels.values(), *filter(None, [request.time]))
    derived = derive_inputs(module, sample, request.inputs, excluded)
    if isinstance(module, OnnxNetwork):
        require_onnx_scores(Path(request.source), module, derived.tensors, derived.returned)
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": request.name or _default_name(request, module),
        "version": request.version,
        "signature": _signature(request, module, sample, derived),
        "network": network.model_dump(mode="json", exclude_defaults=True),
        "data": {split: str(path.resolve()) for split, path in files.items()},
    }
    parse(Draft, document, request.folder / MANIFEST)  # errors name the user's folder
    with scratch_folder("new") as scratch:
        # Copies, because safetensors refuses tensors that share memory.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, scratch / SINGLE)
        (scratch / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
        draft = read_draft(scratch)
        _require_same_scores(request, scratch, draft, derived)
        request.folder.mkdir(parents=True, exist_ok=True)
        for name in (SINGLE, MANIFEST):
            shutil.move(scratch / name, request.folder / name)
    return NewDraft(
        folder=request.folder,
        draft=draft,
        rows_of_table=_rows_of_inputs(module, draft.signature),
        reasons=derived.reasons,
        unused=derived.unused,
        weight_bytes=(request.folder / SINGLE).stat().st_size,
    )


def _require_one_source(request: DraftRequest) -> None:
    """Raise unless the network is in a module or in an ONNX file, and not in both.

    Raises:
        DraftRefused: names the options.
    """
    options = {
        "--onnx": request.onnx is not None,
        "--model": request.model is not None,
        "--weights": request.weights is not None,
        "--config": request.config != "{}",
    }
    given = [option for option, is_given in options.items() if is_given]
    if given[:1] != ["--model"] and given != ["--onnx"]:
        raise DraftRefused("onnx_and_model", got=tuple(given) or ("none",))


def _sample(summaries: Mapping[str, ColumnSummary]) -> dict[str, SampleColumn]:
    """Return the sampled columns that a network can read, by name."""
    return {
        name: SampleColumn(
            name=name,
            kind=cast("ColumnKind", summary.kind),
            values=summary.values,
            shortest=summary.shortest,
            longest=summary.longest,
            low=summary.low,
            high=summary.high,
        )
        for name, summary in summaries.items()
        if summary.kind != OTHER
    }


def _default_name(request: DraftRequest, module: nn.Module) -> str:
    """Return the name of the bundle: that of the class or of the ONNX file, in lower case."""
    if request.onnx is None:
        return type(module).__name__.lower()
    return re.sub(r"[^a-z0-9._-]+", "-", request.onnx.stem.lower()).strip("._-")[:64]


def _require_columns(request: DraftRequest, summaries: Mapping[str, ColumnSummary]) -> None:
    """Raise unless there is a label, and the data has the columns that the user names.

    Raises:
        DraftRefused: contains the option and the columns of the data.
    """
    if not request.labels:
        raise DraftRefused("label_missing", columns=tuple(summaries))
    numbers = {name for name, summary in summaries.items() if summary.kind in ("integer", "float")}
    named = [("--label", column, numbers) for column in request.labels.values()]
    for option, column in (("--group", request.group), ("--time", request.time)):
        if column is not None:
            named.append((option, column, set(summaries)))
    for option, column, known in named:
        if column not in known:
            raise DraftRefused(
                "column_missing", option=option, column=column, columns=tuple(sorted(known))
            )


def _imported(request: DraftRequest) -> tuple[nn.Module, Architecture]:
    """Return the trained network, and the class and arguments that a bundle builds it from."""
    if request.model is None:
        return load_onnx(Path(request.source))
    allowed = load_settings().allowed_modules
    if request.weights is not None:
        return _loaded(request.model, request.config, request.weights)
    module, calls = import_network(request.model, allowed)
    architecture = describe_architecture(module, calls)
    import_architecture(architecture)  # raises if the class is in a module that is not allowed
    return module, architecture


def _loaded(model: str, config_text: str, weights: Path) -> tuple[nn.Module, Architecture]:
    """Build the network of a class and load its weights.

    Raises:
        DraftRefused: the arguments are no JSON object, or the weights do not fit.
        BundleRefused: the class is not allowed, cannot be imported, or is no class.
    """
    try:
        config = json.loads(config_text)
    except ValueError as fault:
        raise DraftRefused("config_no_json", problem=str(fault)) from fault
    if not isinstance(config, dict):
        raise DraftRefused("config_no_json", problem=f"a {type(config).__name__}")
    network_type = network_class(model, load_settings().allowed_modules)
    architecture = Architecture(path=model, config=config)
    import_architecture(architecture)
    try:
        module = network_type(**decode_arguments(config)).eval()
        module.load_state_dict(load_file(weights), strict=True)
    except (BundleRefused, ConstructionFailed, OSError):
        raise
    except Exception as fault:  # of the user's class, or of weights that do not fit
        if is_out_of_memory(fault):
            raise
        raise DraftRefused(
            "weights_unfit", path=str(weights), architecture=model, problem=str(fault)
        ) from fault
    return module, architecture.model_copy(update={"path": class_path(network_type)})


def _require_only_tensors(module: nn.Module) -> None:
    """Raise ``DraftRefused`` if a network's state dict has other values than tensors."""
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise DraftRefused("state_no_tensor", name=name, kind=type(tensor).__name__)


def _signature(
    request: DraftRequest, module: nn.Module, sample: Sample, derived: DerivedInputs
) -> dict[str, Any]:
    """Return the signature as it is written to ``model.json``, without fields at their default."""
    architecture = type(module).__name__
    rows = len(next(iter(sample.values())).values)
    outputs = derive_outputs(
        named_scores(derived.returned, rows, architecture),
        request.labels,
        sample,
        request.metric,
        architecture,
    )
    document: dict[str, Any] = {
        "inputs": [_document_of(item) for item in derived.inputs],
        "outputs": [output.model_dump(mode="json", exclude_defaults=True) for output in outputs],
        "group": request.group,
        "time": request.time,
        "call": None if derived.call == "keywords" else derived.call,
    }
    return {name: value for name, value in document.items() if value is not None}


def _document_of(item: Any) -> dict[str, Any]:
    """Return the fields of an input that differ from their default, and its kind."""
    fields = item.model_dump(mode="json", exclude_defaults=True)
    if fields.get("columns") == [item.name]:
        del fields["columns"]
    if isinstance(item, MatrixInput):
        fields["fields"] = [_document_of(part) for part in item.fields]
    return {"kind": item.kind, **fields}


def _rows_of_inputs(module: nn.Module, signature: Signature) -> dict[str, int]:
    """Return the number of rows of each table that an input reads."""
    rows = rows_of_tables(module, signature)
    return {table: rows[table] for item in signature.inputs for table in all_tables(item)}


def _require_same_scores(
    request: DraftRequest, folder: Path, draft: Draft, derived: DerivedInputs
) -> None:
    """Raise if a network that is built from the draft returns other values than the user's.

    Raises:
        DraftRefused: the values differ.
    """
    architecture = draft.network.architecture
    problem = "other scores"
    try:
        rebuilt = load(import_architecture(architecture), draft.network, folder)
        with torch.no_grad():
            returned = call_network(rebuilt, derived.tensors, draft.signature)
        if same_outputs(returned, derived.returned):
            return
    except (CompressionError, Refused):
        raise
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        problem = f"the error {fault!r}"
    raise DraftRefused(
        "rebuilt_differs", path=request.source, architecture=architecture.path, problem=problem
    )
