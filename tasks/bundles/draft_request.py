"""The user's description of a trained network, and the data for its draft.

A draft is the folder that becomes a bundle when it is packed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast, get_args

from pydantic import Field

from compressors.contracts import FORWARD, ITEMS, Frozen
from compressors.contracts.metrics.families import OUTPUT_NAME
from compressors.inspection.sample import ColumnKind, SampleColumn
from infra.bundle.bundle_folder import SplitName
from infra.bundle.model_json import NAME, VERSION
from infra.data.data_sample import USABLE, ColumnSummary, data_files, summarize_columns
from infra.errors import DraftRefused
from infra.store.disk import translate_input_errors

SPLITS: tuple[str, ...] = get_args(SplitName)
"""The splits that are looked for in a data folder."""


Library = Literal["torch-rechub", "deepctr-torch", "recbole"]
LIBRARY_PACKAGES: Mapping[Library, str] = MappingProxyType(
    {"torch-rechub": "torch_rechub", "deepctr-torch": "deepctr_torch", "recbole": "recbole"}
)
"""The Python package of each library."""


class DraftRequest(Frozen):
    """The user's description of a trained network.

    Attributes:
        folder: the new folder of the draft.
        model: a network, a function that returns one, or with ``weights`` its class, in the form
            ``module:name``; None with ``onnx`` or ``sentence_transformer``.
        data: folder with the splits.
        labels: column with the labels by output, in the order of the outputs.
        metric: the metric that decides quality; None for the default of the task kind.
        group: column that identifies the group of a row, such as its query or user.
        time: column with the time of a row.
        inputs: columns by argument of the network, for arguments with other names than the columns.
        library: the library of the network's class; another class is refused. None: any class.
        method: the method of the network that returns the outputs.
        query_tower: attribute path of the query tower, a submodule or method, of a retrieval model.
        item_tower: attribute path of its item tower.
        item: column with the item's id; None for the only one in the rows and in the catalogue.
        name: name of the bundle; None for the name of the class or ONNX file.
        version: version of the bundle.
        weights: safetensors file with the weights, if ``model`` is a class.
        config: keyword arguments of the class, as JSON, with ``weights``.
        onnx: ONNX file with the network, in place of ``model``.
        sentence_transformer: folder with a model of sentence-transformers, in place of ``model``.
        query_text: column of the rows with the texts of queries; None for the only one.
        item_text: column of the catalogue with the texts of items; None for the only one.
    """

    folder: Path
    model: str | None
    data: Path
    labels: dict[str, str]
    metric: str | None = None
    group: str | None = None
    time: str | None = None
    inputs: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    library: Library | None = None
    method: str = FORWARD
    query_tower: str | None = None
    item_tower: str | None = None
    item: str | None = None
    name: str | None = None
    version: str = "1"
    weights: Path | None = None
    config: str = "{}"
    onnx: Path | None = None
    sentence_transformer: Path | None = None
    query_text: str | None = None
    item_text: str | None = None

    @property
    def source(self) -> str:
        """The module and name, the file or the folder of the network."""
        return self.model or str(self.onnx or self.sentence_transformer)

    @property
    def is_retrieval(self) -> bool:
        """Whether the model retrieves items of a catalogue."""
        return bool(self.towers) or self.sentence_transformer is not None

    @property
    def towers(self) -> dict[str, str]:
        """The attribute paths of the towers that the user names."""
        paths = {"query": self.query_tower, "item": self.item_tower}
        return {name: path for name, path in paths.items() if path is not None}


@dataclass(frozen=True)
class RowsOfData:
    """The rows in a data folder, without the catalogue (the items of a retrieval model).

    Attributes:
        files: the file or folder of each split.
        summaries: a sample and the range of each column.
    """

    files: Mapping[str, Path]
    summaries: Mapping[str, ColumnSummary]


def read_rows(folder: Path) -> RowsOfData:
    """Read the rows in a data folder.

    Raises:
        DraftRefused, DataRefused: the data is missing or cannot be read.
    """
    with translate_input_errors(folder):
        files = {name: path for name, path in data_files(folder, SPLITS).items() if name != ITEMS}
        return RowsOfData(files, summarize_columns(files))


def label_candidates(rows: RowsOfData) -> tuple[str, ...]:
    """Return the columns of numbers, those with only 0 and 1 first."""
    numbers = [column for column in sample_of(rows.summaries).values() if not column.is_list]
    binary = [
        column.name
        for column in numbers
        if column.is_integer and (column.low, column.high) == (0, 1)
    ]
    return (*binary, *(column.name for column in numbers if column.name not in binary))


def catalogue_file(folder: Path) -> Path:
    """Return the file of the catalogue of a retrieval model.

    Raises:
        DraftRefused: there is none.
    """
    path = data_files(folder, SPLITS).get(ITEMS)
    if path is None:
        raise DraftRefused("catalogue_missing", folder=str(folder))
    return path


def sample_of(summaries: Mapping[str, ColumnSummary]) -> dict[str, SampleColumn]:
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
        if summary.kind in USABLE.values()
    }


SOURCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "--model": ("--from", "--weights", "--config", "--method", "--query-tower", "--item-tower"),
        "--onnx": (),
        "--sentence-transformer": ("--query-text", "--item-text"),
    }
)
"""The options that name the network, and the options that belong to each."""


def require_one_source(request: DraftRequest) -> None:
    """Raise unless one option names the network, and all other options belong to it.

    Raises:
        DraftRefused: names the options.
    """
    options = {
        "--model": request.model is not None,
        "--onnx": request.onnx is not None,
        "--sentence-transformer": request.sentence_transformer is not None,
        "--from": request.library is not None,
        "--weights": request.weights is not None,
        "--config": request.config != "{}",
        "--method": request.method != FORWARD,
        "--query-tower": request.query_tower is not None,
        "--item-tower": request.item_tower is not None,
        "--query-text": request.query_text is not None,
        "--item-text": request.item_text is not None,
    }
    source, *others = [option for option, is_given in options.items() if is_given] or ["none"]
    if source not in SOURCES or not set(others) <= set(SOURCES[source]):
        raise DraftRefused("model_sources_conflict", got=(source, *others))
    if request.item is not None and not request.is_retrieval:
        raise DraftRefused("item_without_towers", got=request.item)
    if request.inputs and request.sentence_transformer is not None:
        raise DraftRefused("input_options_refused", got=next(iter(request.inputs)))


def require_names(request: DraftRequest) -> None:
    """Raise ``DraftRefused`` if ``model.json`` does not allow the form of a name of the user."""
    names = [("--name", request.name, NAME), ("--version", request.version, VERSION)]
    for option, name, pattern in names:
        if name is not None and re.fullmatch(pattern, name) is None:
            raise DraftRefused("name_form", option=option, got=name)
    for output in request.labels:
        if re.fullmatch(OUTPUT_NAME, output) is None:
            raise DraftRefused("output_name_form", got=output)


def require_columns(request: DraftRequest, summaries: Mapping[str, ColumnSummary]) -> None:
    """Raise unless there is a label, and the data has the columns that the user names.

    A retrieval model needs no label, because each row may be an interaction. If the user names its
    towers (it is no text encoder), it needs a group.

    Raises:
        DraftRefused: contains the option and the columns of the data.
    """
    if len(request.towers) == 1:
        raise DraftRefused("towers_incomplete")
    if request.towers and request.group is None:
        raise DraftRefused("group_missing", columns=tuple(summaries))
    if request.is_retrieval and len(request.labels) > 1:
        raise DraftRefused("too_many_labels", got=tuple(request.labels))
    if not request.labels and not request.is_retrieval:
        raise DraftRefused("label_missing", columns=tuple(summaries))
    numbers = [name for name, summary in summaries.items() if summary.kind in ("integer", "float")]
    for column in request.labels.values():
        require_column("--label", column, numbers)
    options = {"--group": request.group, "--time": request.time, "--item": request.item}
    for option, name in options.items():
        if name is not None:
            require_column(option, name, summaries)


def require_column(option: str, column: str, known: Iterable[str]) -> str:
    """Return the column that an option names.

    Raises:
        DraftRefused: it is none of the known columns.
    """
    names = tuple(sorted(known))
    if column not in names:
        raise DraftRefused("column_missing", option=option, column=column, columns=names)
    return column
