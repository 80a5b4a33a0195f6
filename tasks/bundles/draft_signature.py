"""Describe the signature of a trained network, as it is written to ``model.json``.

A draft is the folder that becomes a bundle when it is packed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from compressors.contracts import FORWARD, MatrixInput, Output, tensor_names
from compressors.errors.inspection import InspectionFailed
from compressors.inspection.inputs import DerivedInputs, derive_inputs
from compressors.inspection.outputs import derive_outputs, named_scores
from compressors.inspection.sample import Sample
from compressors.inspection.towers import derive_towers
from infra.data.data_sample import TRAIN, summarize_columns
from infra.errors import DraftRefused
from tasks.bundles.draft_request import DraftRequest, sample_of

DEFAULT_METRIC = "recall@20"
"""The metric that decides the quality of a retrieval model by default."""


@dataclass(frozen=True)
class DraftContent:
    """A signature, and what else a draft contains.

    Attributes:
        signature: the signature as it is written to ``model.json``.
        calls: the calls from which it was derived: that of the network, or those of the towers.
        transforms: the content of the files that inputs refer to (tokenizers), by name.
        remarks: sentences for the user about what was derived.
    """

    signature: dict[str, Any]
    calls: tuple[DerivedInputs, ...]
    transforms: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def describe_rows(request: DraftRequest, module: nn.Module, sample: Sample) -> DraftContent:
    """Describe a network that has a score for each row."""
    derived = derive_inputs(
        module, sample, request.inputs, _list_excluded_columns(request), request.method
    )
    _require_read(request, module, request.method, (derived,))
    architecture = type(module).__name__
    rows = len(next(iter(sample.values())).values)
    outputs = derive_outputs(
        named_scores(derived.returned, rows, architecture),
        request.labels,
        sample,
        request.metric,
        architecture,
    )
    signature = {
        "inputs": [document_of(item) for item in derived.inputs],
        "outputs": [output.model_dump(mode="json", exclude_defaults=True) for output in outputs],
        **_build_common_fields(request, derived),
    }
    return DraftContent(signature, (derived,))


def describe_towers(
    request: DraftRequest, module: nn.Module, sample: Sample, catalogue: Path
) -> DraftContent:
    """Describe a network with two towers.

    Raises:
        DraftRefused: the item's id is unknown.
    """
    # ``summarize_columns`` samples the rows of the split ``train``; here it samples the catalogue.
    items = sample_of(summarize_columns({TRAIN: catalogue}))
    derived = derive_towers(
        module,
        request.towers,
        {"query": sample, "item": items},
        request.item or item_column(sample, items),
        request.inputs,
        _list_excluded_columns(request),
    )
    _require_read(request, module, " and ".join(request.towers.values()), derived.calls.values())
    label = next(iter(request.labels.values()), None)
    output = Output(
        name=next(iter(request.labels), "score"),
        kind="retrieval",
        form="score",
        label=label,
        metric=request.metric or DEFAULT_METRIC,
    )
    signature = {
        "inputs": [document_of(item) for item in derived.inputs],
        "outputs": [output.model_dump(mode="json", exclude_defaults=True)],
        **_build_common_fields(request, derived.calls["query"]),
        "item": derived.item,
        "towers": derived.towers.model_dump(mode="json"),
    }
    return DraftContent(signature, tuple(derived.calls.values()))


def _require_read(
    request: DraftRequest, module: nn.Module, method: str, calls: Iterable[DerivedInputs]
) -> None:
    """Raise if the user named the columns of an input that the network does not read.

    Raises:
        InspectionFailed: contains the names of the inputs that it reads.
    """
    read = [name for call in calls for item in call.inputs for name in tensor_names(item)]
    if unread := tuple(name for name in request.inputs if name not in read):
        raise InspectionFailed(
            "inputs_unknown",
            architecture=type(module).__name__,
            method=method,
            names=unread,
            arguments=tuple(read),
        )


def item_column(rows: Sample, items: Sample) -> str:
    """Return the only column of integers that rows and catalogue have.

    Raises:
        DraftRefused: there is none, or there are several.
    """
    common = tuple(name for name in rows if name in items and rows[name].kind == "integer")
    if len(common) != 1:
        raise DraftRefused("item_unknown", columns=common or "none")
    return common[0]


def _list_excluded_columns(request: DraftRequest) -> tuple[str, ...]:
    """Return the columns that are no inputs unless the user names them."""
    return (*request.labels.values(), *filter(None, [request.time]))


def _build_common_fields(request: DraftRequest, derived: DerivedInputs) -> dict[str, Any]:
    """Return the fields of the signature that differ from their default."""
    fields = {
        "group": request.group,
        "time": request.time,
        "call": None if derived.call.form == "keywords" else derived.call.form,
        "method": None if request.method == FORWARD else request.method,
    }
    return {name: value for name, value in fields.items() if value is not None}


def document_of(item: Any) -> dict[str, Any]:
    """Return the fields of an input that differ from their default, and its kind."""
    fields = item.model_dump(mode="json", exclude_defaults=True)
    if fields.get("columns") == [item.name]:
        del fields["columns"]
    if isinstance(item, MatrixInput):
        fields["fields"] = [document_of(part) for part in item.fields]
    return {"kind": item.kind, **fields}
