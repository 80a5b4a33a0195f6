"""Find how a network's method receives its inputs, and which columns fill each of them.

A *companion* of an argument with lists is another argument that is computed from the lists: their
offsets, lengths, mask or positions (its *role*).
"""

import fnmatch
import inspect
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import nn

from compressors.contracts import FORWARD
from compressors.core.scores import scoring_method
from compressors.errors.inspection import InspectionFailed
from compressors.inspection.sample import Sample, SampleColumn
from compressors.onnx_network.network import OnnxNetwork

CallForm = Literal["keywords", "mapping"]
MaskType = Literal["float32", "bool", "int64"]


@dataclass(frozen=True)
class Argument:
    """One input tensor of a network.

    Attributes:
        name: the argument of the method, or the key in its mapping.
        columns: the columns that fill the tensor, in their order.
        widths: a number for each of ``columns``. If several columns fill one matrix, a column of
            lists fills this number of the matrix's columns. 0 for a column of numbers, and for
            lists that fill a tensor alone.
        offsets: name of the argument with the position of each row's first id, if lists are
            concatenated; None otherwise.
        lengths: name of the argument with the length of each list; None if there is none.
        mask: name of the argument that is 1 at ids and 0 at padding; None if there is none.
        positions: name of the argument with the position of each id in its list; None if there is
            none.
        first_position: the position of the first id, 0 or 1.
        mask_dtype: dtype of the mask.
    """

    name: str
    columns: tuple[str, ...]
    widths: tuple[int, ...]
    offsets: str | None = None
    lengths: str | None = None
    mask: str | None = None
    positions: str | None = None
    first_position: int = 0
    mask_dtype: MaskType = "float32"

    @property
    def padding_companions(self) -> tuple[str, ...]:
        """The arguments with the mask, lengths and positions of padded lists, if there are any.

        ``offsets`` does not count, since concatenated lists have no padding.
        """
        names = (self.mask, self.lengths, self.positions)
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True)
class Call:
    """How a network is called: its method, and whether that receives keywords or one mapping."""

    method: str
    form: CallForm


@dataclass(frozen=True)
class Layout:
    """The inputs of a network, and how it is called with them."""

    call: Call
    arguments: tuple[Argument, ...]


# How a user declares a companion, for example lengths(history).
_DECLARED_COMPANION = re.compile(r"(lengths|mask|positions|positions_from_1)\((\w+)\)")

# Usual names of companions by role, with the name of the argument with lists in place of {}. The
# names without {} are accepted if the network has only one argument with lists.
_COMPANION_NAMES = {
    "offsets": ("{}_offsets",),
    "lengths": ("{}_lengths", "{}_length", "lengths", "length"),
    "mask": ("{}_mask", "mask", "attention_mask"),
    "positions": ("{}_positions", "positions", "position_ids"),
}


def layouts(
    network: nn.Module,
    method: str,
    sample: Sample,
    requested: Mapping[str, Sequence[str]],
    excluded: Sequence[str],
) -> Iterator[Layout]:
    """Yield the layouts to try, the most probable first.

    Args:
        network: the network.
        method: its method that returns the outputs, or the attribute path of a submodule.
        sample: the columns of the data.
        requested: columns by argument, as the user named them. A column may be a pattern such as
            ``d*``. ``lengths(history)`` is computed from the lists that fill the argument
            ``history``, and so are ``mask``, ``positions`` and ``positions_from_1``.
        excluded: columns that are no inputs unless the user names them, such as labels.

    Raises:
        InspectionFailed: an argument has no column, or the user named a column that is missing.
    """
    # The companions that the user declares: role, such as "lengths", and argument with the lists.
    declared = {
        name: match.groups()
        for name, columns in requested.items()
        if (match := _DECLARED_COMPANION.fullmatch(",".join(columns)))
    }
    requested_columns = {
        name: _resolve_columns(name, columns, sample, excluded)
        for name, columns in requested.items()
        if name not in declared
    }
    parameters = _read_parameters(network, method)
    keywords, mapping = Call(method, "keywords"), Call(method, "mapping")
    required = [name for name, parameter in parameters.items() if _is_required(parameter)]
    # An optional argument for labels only serves to compute the loss, so scoring leaves it out.
    columns_of: dict[str, tuple[str, ...]] = {
        name: (name,)
        for name in parameters
        if name in sample and name not in declared and (name in required or name not in excluded)
    }
    columns_of |= requested_columns
    lists = [
        name for name in columns_of if name in parameters and _is_list(columns_of[name], sample)
    ]
    companions_of = {
        name: {
            **_find_companions(name, parameters, {*columns_of, *declared}, only=len(lists) == 1),
            **{
                role: argument
                for argument, (role, lists_name) in declared.items()
                if lists_name == name
            },
        }
        for name in lists
    }
    companions = {argument for roles in companions_of.values() for argument in roles.values()}
    missing = [name for name in required if name not in columns_of and name not in companions]
    is_graph = isinstance(network, OnnxNetwork)
    if not missing and all(name in parameters for name in requested_columns):
        arguments = [
            _build_argument(name, columns_of[name], sample, companions_of.get(name, {}))
            for name in parameters
            if name in columns_of
        ]
        yield Layout(mapping if is_graph else keywords, tuple(arguments))
        return
    if not missing and (is_graph or len(required) != 1):
        raise InspectionFailed(
            "inputs_unknown",
            architecture=type(network).__name__,
            method=method,
            names=tuple(name for name in requested if name not in parameters),
            arguments=tuple(parameters),
        )
    if is_graph or len(required) != 1:
        raise _build_arguments_unknown(network, method, missing, sample)
    # The only argument is one matrix or a mapping from names to tensors.
    matrix = (
        None if requested_columns else _find_described_matrix(network, method, required[0], sample)
    )
    if matrix is not None:
        yield Layout(keywords, (matrix,))
        return
    of_mapping = {name: (name,) for name in sample if name not in excluded} | requested_columns
    yield Layout(mapping, _list_arguments_of_mapping(of_mapping, declared, sample))
    if not requested_columns:
        columns = [name for name in sample if name not in excluded and not sample[name].is_list]
        yield Layout(keywords, (_build_argument(required[0], columns, sample),))


def _list_arguments_of_mapping(
    columns_of: Mapping[str, Sequence[str]],
    declared: Mapping[str, tuple[str, ...]],
    sample: Sample,
) -> tuple[Argument, ...]:
    """Return the arguments of a mapping.

    A column of integers that are the lengths of a column of lists is computed from the lists, so
    that both always agree.

    Args:
        columns_of: the columns that fill each argument.
        declared: the companions that the user declares, by argument: role, argument with the lists.
        sample: the columns of the data.
    """
    lists = [name for name, columns in columns_of.items() if _is_list(columns, sample)]
    companion_roles = {
        argument: ("lengths", name)
        for name in reversed(lists)
        for argument, columns in columns_of.items()
        if _are_lengths(sample[columns[0]], sample[columns_of[name][0]])
    } | dict(declared)
    return tuple(
        _build_argument(
            name,
            columns,
            sample,
            {
                role: argument
                for argument, (role, lists_name) in companion_roles.items()
                if lists_name == name
            },
        )
        for name, columns in columns_of.items()
        if name not in companion_roles
    )


def _are_lengths(column: SampleColumn, lists: SampleColumn) -> bool:
    """Return whether integers are the lengths of lists. False if all lists have one length."""
    if column.kind != "integer" or lists.shortest == lists.longest:
        return False
    pairs = zip(column.values, lists.values, strict=True)
    bounds = (column.low, column.high) == (lists.shortest, lists.longest)
    return bounds and all(count == len(values) for count, values in pairs)


def _find_described_matrix(
    network: nn.Module, method: str, name: str, sample: Sample
) -> Argument | None:
    """Return the matrix whose columns the attribute ``feature_index`` describes.

    DeepCTR-Torch sets it to ``{feature: (first column, last column + 1)}``.

    Raises:
        InspectionFailed: the data has no column for a feature.
    """
    index = getattr(network, "feature_index", None)
    if not isinstance(index, Mapping) or not all(
        isinstance(columns, tuple) and len(columns) == 2 for columns in index.values()
    ):
        return None
    if missing := [feature for feature in index if feature not in sample]:
        raise _build_arguments_unknown(network, method, missing, sample)
    widths = (
        stop - start if sample[feature].is_list else 0 for feature, (start, stop) in index.items()
    )
    return Argument(name, tuple(index), tuple(widths))


def _read_parameters(network: nn.Module, method: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a method, or the inputs of an ONNX graph, by name.

    Raises:
        InspectionFailed: there is no such method, or it takes any number of arguments.
    """
    if isinstance(network, OnnxNetwork):  # its only argument is a mapping with these names
        keyword = inspect.Parameter.KEYWORD_ONLY
        return {item.name: inspect.Parameter(item.name, keyword) for item in network.inputs}
    architecture = type(network).__name__
    try:
        function = scoring_method(network, method)
    except AttributeError as fault:
        raise InspectionFailed(
            "method_missing", architecture=architecture, method=method
        ) from fault
    # A submodule is called, but its ``forward`` has the arguments.
    parameters = dict(inspect.signature(getattr(function, FORWARD, function)).parameters)
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InspectionFailed(
                "arguments_variable", architecture=architecture, method=method, name=name
            )
    return parameters


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def _resolve_columns(
    name: str, patterns: Sequence[str], sample: Sample, excluded: Container[str]
) -> tuple[str, ...]:
    """Return the columns that the patterns of one argument name, in their order.

    A pattern matches no column that is excluded.

    Raises:
        InspectionFailed: a pattern names no column.
    """
    columns: list[str] = []
    missing = []
    for pattern in patterns:
        allowed = [column for column in sample if column not in excluded]
        matching = [pattern] if pattern in sample else fnmatch.filter(allowed, pattern)
        columns += matching
        if not matching:
            missing.append(pattern)
    if missing:
        raise InspectionFailed(
            "columns_missing", name=name, missing=tuple(missing), columns=tuple(sample)
        )
    return tuple(dict.fromkeys(columns))


def _is_list(columns: Sequence[str], sample: Sample) -> bool:
    return len(columns) == 1 and sample[columns[0]].kind == "integer_list"


def _find_companions(
    name: str,
    parameters: Mapping[str, inspect.Parameter],
    filled: Container[str],
    *,
    only: bool,
) -> dict[str, str]:
    """Return the companions of an argument with lists by role, found by their usual names.

    Args:
        name: the argument with lists.
        parameters: the parameters of the method.
        filled: arguments that columns fill or that the user declares.
        only: whether ``name`` is the only argument with lists.
    """
    companions = {}
    for role, patterns in _COMPANION_NAMES.items():
        for pattern in patterns:
            argument = pattern.format(name)
            if argument in parameters and argument not in filled and (only or "{}" in pattern):
                companions[role] = argument
                break
    return companions


def _build_argument(
    name: str,
    columns: Sequence[str],
    sample: Sample,
    companions: Mapping[str, str] = MappingProxyType({}),
) -> Argument:
    """Return an argument that columns fill.

    Among several columns, one of lists is as wide as its longest list.
    """
    widths = [
        sample[column].longest if sample[column].is_list and len(columns) > 1 else 0
        for column in columns
    ]
    return Argument(
        name,
        tuple(columns),
        tuple(widths),
        offsets=companions.get("offsets"),
        lengths=companions.get("lengths"),
        mask=companions.get("mask"),
        positions=companions.get("positions_from_1", companions.get("positions")),
        first_position=int("positions_from_1" in companions),
    )


def _build_arguments_unknown(
    network: nn.Module, method: str, missing: Sequence[str], sample: Sample
) -> InspectionFailed:
    return InspectionFailed(
        "arguments_unknown",
        architecture=type(network).__name__,
        method=method,
        names=tuple(missing),
        first=next(iter(missing), "NAME"),
        columns=tuple(sample),
    )
