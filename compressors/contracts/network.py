"""The type ``Network``: the description that, with the stored tensors, defines a module.

JSON cannot store Python objects. An argument that is an object, such as a dataclass with settings
or a feature column of a library, is described by its class and the arguments that create it
(``CLASS`` and ``ARGUMENTS``). Without ``ARGUMENTS``, the value is the class itself::

    {"$class": "shop.settings:Settings", "$arguments": {"dim": 16, "hidden": [64, 32]}}
    {"$class": "torch.nn:ReLU"}

An object that reads files when it is created, such as a data set, is described by what the
constructor of the network reads from it (``READS``): attributes, items, results of ``in`` and of
calls. A method is an attribute whose value has recorded calls::

    {"$reads": {"items": {"dim": 16}, "attributes": {"num": {"$reads": {
        "calls": [{"arguments": ["user"], "value": 300}]}}}}}
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from compressors.contracts.frozen import Frozen

CLASS, ARGUMENTS = "$class", "$arguments"
"""Keys of the description of an object in ``Architecture.config``."""

ONNX_NETWORK = "compressors.onnx_network.network:OnnxNetwork"
"""The class of networks that were read from an ONNX file."""

TEXT_RETRIEVER = "compressors.text_encoder.network:TextRetriever"
"""The class of networks that were read from a folder of sentence-transformers."""

OWN_NETWORKS = frozenset({ONNX_NETWORK, TEXT_RETRIEVER})
"""The paths of network classes of recpress itself. Bundles store them, so they do not change."""

READS = "$reads"
"""Key of the description of an object by what a constructor reads from it."""


class RecordedCall(Frozen):
    """A call of an object: its positional and keyword arguments, and what it returned."""

    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = Field(default_factory=dict)
    value: Any


class Reads(Frozen):
    """What a constructor read from an object. A value may be the reads of another object.

    Attributes:
        attributes: values by name, ``object.name``.
        items: values by key, ``object[key]``.
        contains: results by key, ``key in object``.
        calls: the calls ``object(...)``.
    """

    attributes: dict[str, Any] = Field(default_factory=dict)
    items: dict[str, Any] = Field(default_factory=dict)
    contains: dict[str, bool] = Field(default_factory=dict)
    calls: tuple[RecordedCall, ...] = ()


class Architecture(Frozen):
    """Import path of the network's class, and its keyword arguments."""

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description='Keyword arguments. An object is {"$class": "module:Class", "$arguments": '
        '{...}}, a class {"$class": "module:Class"}. {"$reads": {...}} is what the constructor '
        "reads from an object.",
    )

    @property
    def argument_classes(self) -> tuple[str, ...]:
        """The paths of all classes that the arguments name, sorted."""
        return tuple(sorted(set(_iterate_class_paths(self.config))))


def is_class_description(value: Any) -> bool:
    """Return whether a value of a configuration describes an object or a class."""
    return isinstance(value, Mapping) and CLASS in value


def _iterate_class_paths(value: Any) -> Iterator[str]:
    """Yield the class paths in a value of a configuration."""
    if is_class_description(value):
        yield str(value[CLASS])
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _iterate_class_paths(item)


class ModuleRecord(Frozen):
    """The description of a compressed module, which replaces a module of the architecture.

    Attributes:
        kind: what it replaces: an Embedding (``table``), EmbeddingBag (``bag``), Linear, norm, or
            Conv1d of kernel size 1 (``conv``). ``output`` replaces nothing: it is a function that
            recalibrates the network's output.
        format: name of the storage format.
        settings: arguments of the compressed module.
    """

    kind: Literal["table", "bag", "linear", "norm", "conv", "output"]
    format: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Network(Frozen):
    """The description from which, with the stored tensors, a module is built.

    ``modules`` contains the record of each compressed module, by attribute path.
    """

    architecture: Architecture
    modules: dict[str, ModuleRecord] = Field(default_factory=dict)
    ties: dict[str, str] = Field(
        default_factory=dict, description="Tensor name -> the stored tensor it shares."
    )
