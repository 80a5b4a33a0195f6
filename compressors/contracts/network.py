"""Network: architecture, records and ties that, with the tensors, define a module. Types only."""

from typing import Any, Literal

from pydantic import Field

from compressors.contracts.inputs import Frozen


class Architecture(Frozen):
    """Import path of the network's class, and its keyword arguments."""

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class")
    config: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments.")


class ModuleRecord(Frozen):
    """The compressed module that replaces an Embedding, EmbeddingBag, Linear or norm.

    Kind ``output`` is a map after the network's output, where the architecture has no module.
    """

    kind: Literal["table", "bag", "linear", "norm", "output"]
    format: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Network(Frozen):
    """The description that, with the tensors, is needed to build a module."""

    architecture: Architecture
    modules: dict[str, ModuleRecord] = Field(default_factory=dict)
    ties: dict[str, str] = Field(
        default_factory=dict, description="Tensor name -> the stored tensor it shares."
    )
