"""The type ``Network``: the description that, with the stored tensors, defines a module."""

from typing import Any, Literal

from pydantic import Field

from compressors.contracts.frozen import Frozen


class Architecture(Frozen):
    """Import path of the network's class, and its keyword arguments."""

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class")
    config: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments.")


class ModuleRecord(Frozen):
    """The description of a compressed module, which replaces a module of the architecture.

    Attributes:
        kind: what it replaces: an Embedding (``table``), EmbeddingBag (``bag``), Linear or norm.
            ``output`` replaces nothing: it is a map that is applied to the network's output.
        format: name of the storage format.
        settings: arguments of the compressed module.
    """

    kind: Literal["table", "bag", "linear", "norm", "output"]
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
