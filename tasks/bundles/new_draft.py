"""Write the draft of a bundle from a trained network and rows of the data.

A draft is the folder that becomes a bundle when it is packed.

The network comes from a user's Python module, an ONNX file or a folder of sentence-transformers.

To derive the inputs and outputs, a network from a module or an ONNX file is called with rows of the
data (``compressors/inspection``). The constructor arguments of a network from a module are recorded
while it is constructed (``infra/bundle/live_model.py``).
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressors.contracts import (
    ITEMS,
    Architecture,
    Network,
    Signature,
    all_tables,
    is_out_of_memory,
)
from compressors.core.runner import rows_of_tables
from compressors.core.scores import call_network, row_vectors, tower_vectors
from compressors.core.smoke_test import has_own_score, must_repeat_single_row
from compressors.core.state.argument_values import decode_arguments
from compressors.core.state.module_state import load, tensors_of
from compressors.core.state.tensor_files import SINGLE
from compressors.errors.compression import CompressionError
from compressors.errors.construction import ConstructionFailed
from compressors.inspection.inputs import DerivedInputs
from compressors.inspection.lookups import same_outputs
from compressors.onnx_network.network import OnnxNetwork
from infra.bundle.architecture import network_class
from infra.bundle.bundle_folder import MANIFEST, SCHEMA_VERSION, Draft, read_draft
from infra.bundle.json_reader import parse
from infra.bundle.live_model import class_path, describe_architecture, import_network
from infra.errors import BundleRefused, DraftRefused, Refused
from infra.settings import load_settings
from infra.store.disk import translate_input_errors
from infra.store.temporary import scratch_folder
from tasks.bundles.draft_request import (
    LIBRARY_PACKAGES,
    DraftRequest,
    Library,
    RowsOfData,
    catalogue_file,
    read_rows,
    require_columns,
    require_names,
    require_one_source,
    sample_of,
)
from tasks.bundles.draft_signature import describe_rows, describe_towers
from tasks.bundles.loading import import_architecture
from tasks.bundles.onnx_models import load_onnx, require_onnx_scores
from tasks.bundles.text_models import load_text_model
from tasks.bundles.text_signature import describe_texts

REPEATED = (
    "The network's code fails for a batch of one row, so recpress calls it with such a row twice "
    "(repeat_single_row). The served graph needs only one."
)

SCORED_BY_TOWERS = (
    "The network returns no score of a query and an item when it is called with the inputs of both "
    "towers. Their score is the dot product of their vectors (scored_by)."
)


@dataclass(frozen=True)
class NewDraft:
    """A draft that was written.

    Attributes:
        folder: its folder.
        draft: its ``model.json``.
        rows_of_table: number of rows of each table that an input is looked up in, by its path.
        reasons: the reason for the kind of each input, by input.
        unused: columns of inputs that do not affect any output.
        weight_bytes: size of the file of weights.
        remarks: further sentences about what was derived.
    """

    folder: Path
    draft: Draft
    rows_of_table: dict[str, int]
    reasons: Mapping[str, str]
    unused: tuple[str, ...]
    weight_bytes: int
    remarks: tuple[str, ...] = ()


def new_draft(request: DraftRequest, rows: RowsOfData | None = None) -> NewDraft:
    """Derive the signature of a trained network, and write it with the weights as a draft.

    Args:
        request: the network and the user's description of it.
        rows: the rows of the data, if they are read already.

    Raises:
        BundleRefused: the module is not allowed or cannot be imported, or a field is invalid.
        DraftRefused: the network, its arguments, the data or the folder cannot be used.
        InspectionFailed: an input or output cannot be derived.
        DataRefused: the data cannot be read.
    """
    # Standard output has only the result of the command, not what the user's constructors print.
    with translate_input_errors(request.folder), redirect_stdout(sys.stderr):
        return _new_draft(request, rows)


def _new_draft(request: DraftRequest, rows: RowsOfData | None) -> NewDraft:
    require_one_source(request)
    if request.folder.exists() and any(request.folder.iterdir()):
        raise DraftRefused("folder_not_empty", folder=str(request.folder))
    require_names(request)
    rows = rows or read_rows(request.data)
    require_columns(request, rows.summaries)
    sample, files = sample_of(rows.summaries), dict(rows.files)
    if request.is_retrieval:
        files[ITEMS] = catalogue_file(request.data)
    module: nn.Module
    if request.sentence_transformer is not None:
        texts = load_text_model(request.sentence_transformer)
        module, architecture = texts.network, texts.architecture
        described = describe_texts(request, texts, rows.summaries, files[ITEMS])
    else:
        module, architecture = _load_network(request)
        _require_only_tensors(module)
        described = (
            describe_towers(request, module, sample, files[ITEMS])
            if request.towers
            else describe_rows(request, module, sample)
        )
    tensors, ties = tensors_of(module)
    network = Network(architecture=architecture, ties=ties)
    if isinstance(module, OnnxNetwork):
        (call,) = described.calls
        require_onnx_scores(Path(request.source), module, call.tensors, call.returned)
    document = {
        "schema_version": SCHEMA_VERSION,
        "name": request.name or _default_name(request, module),
        "version": request.version,
        "signature": described.signature,
        "network": network.model_dump(mode="json", exclude_defaults=True),
        "data": {split: str(path.resolve()) for split, path in files.items()},
    }
    if described.transforms:
        document["transforms"] = {file: file for file in described.transforms}
    checked = parse(Draft, document, request.folder / MANIFEST)  # errors name the user's folder
    fields, remarks = _derive_call_fields(module, checked.signature)
    document["signature"] = {**described.signature, **fields}
    with scratch_folder("new") as scratch:
        # Copies, because safetensors refuses tensors that share memory.
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, scratch / SINGLE)
        for file, content in described.transforms.items():
            (scratch / file).write_text(content)
        (scratch / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
        draft = read_draft(scratch)
        _require_same_scores(request, scratch, draft, described.calls)
        request.folder.mkdir(parents=True, exist_ok=True)
        for name in (SINGLE, *described.transforms, MANIFEST):
            shutil.move(scratch / name, request.folder / name)
    return NewDraft(
        folder=request.folder,
        draft=draft,
        rows_of_table=_count_table_rows(module, draft.signature),
        reasons={name: why for call in described.calls for name, why in call.reasons.items()},
        unused=tuple(column for call in described.calls for column in call.unused),
        weight_bytes=(request.folder / SINGLE).stat().st_size,
        remarks=(*described.remarks, *remarks),
    )


def _derive_call_fields(
    module: nn.Module, signature: Signature
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Derive the fields of a signature that describe an unusual call of the network.

    Returns:
        The fields, without those that have their default, and a sentence for the user about each.
    """
    fields: dict[str, Any] = {}
    remarks: list[str] = []
    if signature.towers is not None and not has_own_score(module, signature):
        fields["scored_by"] = "towers"
        remarks.append(SCORED_BY_TOWERS)
    if must_repeat_single_row(module, signature.model_copy(update=fields)):
        fields["repeat_single_row"] = True
        remarks.append(REPEATED)
    return fields, tuple(remarks)


def _default_name(request: DraftRequest, module: nn.Module) -> str:
    """Return the name of the bundle: that of the class, file or folder, in lower case."""
    if request.model is not None:
        return type(module).__name__.lower()
    path = Path(request.source).resolve()
    name = path.stem if request.onnx is not None else path.name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-")[:64]


def _load_network(request: DraftRequest) -> tuple[nn.Module, Architecture]:
    """Load the trained network.

    Returns:
        The network, and its class and arguments, from which a bundle builds it.
    """
    if request.model is None:
        return load_onnx(Path(request.source))
    if request.weights is not None:
        module, architecture = _build_with_weights(request.model, request.config, request.weights)
    else:
        module, calls = import_network(request.model, load_settings().allowed_modules)
        architecture = describe_architecture(module, calls)
        import_architecture(architecture)  # raises if the class is in a module that is not allowed
    _require_library(module, request.library)
    return module, architecture


def _require_library(module: nn.Module, library: Library | None) -> None:
    """Raise ``DraftRefused`` unless the network's class, or a base class, is of the library."""
    if library is None:
        return
    package = LIBRARY_PACKAGES[library]
    if all(base.__module__.partition(".")[0] != package for base in type(module).__mro__):
        got = class_path(type(module))
        raise DraftRefused("library_differs", library=library, package=package, got=got)


def _build_with_weights(
    model: str, config_text: str, weights: Path
) -> tuple[nn.Module, Architecture]:
    """Build the network of a class and load its weights.

    Raises:
        DraftRefused: the arguments are not a JSON object, or the weights do not fit the class.
        BundleRefused: the class is not allowed or cannot be imported, or is not a class.
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
    except Exception as fault:  # raised by the user's class, or by weights that do not fit
        if is_out_of_memory(fault):
            raise
        raise DraftRefused(
            "weights_unfit", path=str(weights), architecture=model, problem=str(fault)
        ) from fault
    return module, architecture.model_copy(update={"path": class_path(network_type)})


def _require_only_tensors(module: nn.Module) -> None:
    """Raise ``DraftRefused`` if the state dict of a network has values that are not tensors."""
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise DraftRefused("state_no_tensor", name=name, kind=type(tensor).__name__)


def _count_table_rows(module: nn.Module, signature: Signature) -> dict[str, int]:
    """Return the number of rows of each table that an input is looked up in, by its path."""
    rows = rows_of_tables(module, signature)
    return {table: rows[table] for item in signature.inputs for table in all_tables(item)}


def _require_same_scores(
    request: DraftRequest, folder: Path, draft: Draft, calls: Sequence[DerivedInputs]
) -> None:
    """Raise if a network that is built from the draft has other outputs than the user's network.

    Args:
        request: the user's network, for the message.
        folder: the folder with the weights.
        draft: the draft.
        calls: the call of the network, or the calls of the towers in their order.

    Raises:
        DraftRefused: the outputs differ.
    """
    architecture, signature = draft.network.architecture, draft.signature
    problem = "other scores"
    try:
        rebuilt = load(import_architecture(architecture), draft.network, folder)
        with torch.no_grad():
            if signature.towers is None:
                expected = [call.returned for call in calls]
                returned = [call_network(rebuilt, call.tensors, signature) for call in calls]
            else:
                expected = [row_vectors(call.returned) for call in calls]
                returned = [
                    tower_vectors(rebuilt, call.tensors, signature, tower)
                    for tower, call in zip(signature.towers.named(), calls, strict=True)
                ]
        if same_outputs(returned, expected):
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
