"""Derive the towers of a retrieval model and their inputs."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from compressors.contracts import FORWARD, AnyInput, Attributes, IdInput, KeyInput, Tower, Towers
from compressors.core.scores import row_vectors, scoring_method, temporary_attributes
from compressors.errors.inspection import InspectionFailed
from compressors.inspection.inputs import DerivedInputs, derive_inputs
from compressors.inspection.sample import Sample

INFERENCE_ATTRIBUTES: Mapping[str, Sequence[Attributes]] = {
    # torch-rechub: models return other vectors, or none, unless ``mode`` names the tower.
    "query": ({"mode": "user"},),
    "item": ({"mode": "item"},),
}
"""By tower, attributes that libraries set on a network to compute the vectors of this tower."""


@dataclass(frozen=True)
class DerivedTowers:
    """The towers of a retrieval model.

    Attributes:
        towers: the submodule or method of each tower, and its inputs.
        calls: by tower, its inputs and what it returned.
        inputs: the inputs of both towers. If the item's id enters no tower, also a ``KeyInput``,
            which only identifies the item.
        item: name of the input with the item's id.
    """

    towers: Towers
    calls: Mapping[str, DerivedInputs]
    inputs: tuple[AnyInput, ...]
    item: str


def derive_towers(
    network: nn.Module,
    paths: Mapping[str, str],
    samples: Mapping[str, Sample],
    item_column: str,
    given: Mapping[str, Sequence[str]],
    excluded: Sequence[str],
) -> DerivedTowers:
    """Derive the towers of a network and their inputs.

    If a tower does not return a vector for each row, it is called again with the attributes that
    libraries set for inference (``INFERENCE_ATTRIBUTES``), if its module has them.

    Args:
        network: the trained network, in evaluation mode.
        paths: attribute path of the submodule or method of the towers ``query`` and ``item``.
        samples: the sampled columns that each tower can read: those of the rows and those of the
            catalogue.
        item_column: the column with the item's id.
        given: columns by argument, as the user named them.
        excluded: columns that are no inputs unless the user names them, such as labels.

    Raises:
        InspectionFailed: there is no such tower; it does not return a vector for each row; one
            tower is called with keywords and the other one with a mapping; or ``derive_inputs``
            raises it.
    """
    split = {name: _split_path(network, path) for name, path in paths.items()}
    names = {name: _list_argument_names(network, path) for name, path in paths.items()}
    calls: dict[str, DerivedInputs] = {}
    attributes: dict[str, Attributes] = {}
    for name, path in paths.items():
        owner = network.get_submodule(split[name][0])
        arguments = _select_given_arguments(name, names, given, samples)
        calls[name], attributes[name] = _derive_tower(
            network, owner, name, path, samples[name], arguments, excluded
        )
    if len({call.call.form for call in calls.values()}) > 1:
        forms = {paths[name]: call.call.form for name, call in calls.items()}
        raise InspectionFailed("tower_calls_differ", forms=forms)
    inputs = tuple(item for call in calls.values() for item in call.inputs)
    item = next(
        (
            entry.name
            for entry in calls["item"].inputs
            if isinstance(entry, IdInput) and entry.columns == (item_column,)
        ),
        None,
    )
    if item is None:
        item, inputs = item_column, (*inputs, KeyInput(name=item_column))
    towers = {
        name: Tower(
            module=module,
            method=method,
            attributes=attributes[name],
            inputs=tuple(i.name for i in calls[name].inputs),
        )
        for name, (module, method) in split.items()
    }
    return DerivedTowers(Towers.model_validate(towers), calls, inputs, item)


def _derive_tower(
    network: nn.Module,
    owner: nn.Module,
    name: str,
    path: str,
    sample: Sample,
    given: Mapping[str, Sequence[str]],
    excluded: Sequence[str],
) -> tuple[DerivedInputs, Attributes]:
    """Derive the inputs of one tower, and the attributes with which it returns vectors.

    Args:
        network: the network.
        owner: the submodule, or the network, that is called or whose method is called.
        name: ``query`` or ``item``.
        path: attribute path of the submodule or method.
        sample: the sampled columns.
        given: columns by argument, as the user named them.
        excluded: columns that are no inputs unless the user names them.

    Raises:
        InspectionFailed: the error without any attributes.
    """
    first_error: InspectionFailed | None = None
    for attributes in ({}, *INFERENCE_ATTRIBUTES[name]):
        if not all(hasattr(owner, attribute) for attribute in attributes):
            continue
        try:
            with temporary_attributes(owner, attributes):
                call = derive_inputs(network, sample, given, excluded, path)
            _require_vectors(path, call.returned, len(next(iter(call.tensors.values()))))
        except InspectionFailed as error:
            first_error = first_error or error
            continue
        return call, attributes
    assert first_error is not None  # noqa: S101 - the first candidate has no attributes
    raise first_error


def _split_path(network: nn.Module, path: str) -> tuple[str, str]:
    """Return the submodule and the method of a tower, from its attribute path.

    Raises:
        InspectionFailed: the network has no such submodule or method.
    """
    modules = dict(network.named_modules())
    if path in modules:
        return path, FORWARD
    parent, _, method = path.rpartition(".")
    if parent not in modules or not callable(getattr(modules[parent], method, None)):
        raise InspectionFailed(
            "tower_missing",
            architecture=type(network).__name__,
            path=path,
            names=tuple(name for name, _ in network.named_children()),
        )
    return parent, method


def _list_argument_names(network: nn.Module, path: str) -> tuple[str, ...]:
    """Return the names of a tower's arguments."""
    tower = scoring_method(network, path)
    return tuple(inspect.signature(getattr(tower, FORWARD, tower)).parameters)


def _select_given_arguments(
    tower: str,
    names: Mapping[str, Sequence[str]],
    given: Mapping[str, Sequence[str]],
    samples: Mapping[str, Sample],
) -> dict[str, Sequence[str]]:
    """Return the arguments that the user named for one tower.

    They are arguments of the tower, or, if it is called with a mapping, those whose columns are in
    its data.
    """
    others = {name for other, own in names.items() if other != tower for name in own}
    return {
        argument: columns
        for argument, columns in given.items()
        if argument in names[tower]
        or (argument not in others and any(column in samples[tower] for column in columns))
    }


def _require_vectors(path: str, returned: object, rows: int) -> None:
    """Raise ``InspectionFailed`` unless a tower returned a vector for each row."""
    vectors = row_vectors(returned)
    if isinstance(vectors, Tensor) and vectors.dim() == 2 and len(vectors) == rows:
        return
    got = str(tuple(returned.shape)) if isinstance(returned, Tensor) else type(returned).__name__
    raise InspectionFailed("tower_vectors", path=path, got=got)
