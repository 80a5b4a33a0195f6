"""What is needed, with the tensors, to build a module. Types only."""

from typing import Any, Literal

from pydantic import Field

from compressors.contracts.inputs import Frozen


class Architecture(Frozen):
    """Where the network's class lies and what it is built with."""

    path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:Class")
    config: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments.")


class ModuleRecord(Frozen):
    """What stands where the architecture built an Embedding, EmbeddingBag, Linear or norm.

    One of kind ``output`` stands where it built nothing, behind its output.
    """

    kind: Literal["table", "bag", "linear", "norm", "output"]
    format: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Network(Frozen):
    """What is needed, with the tensors, to build a module."""

    architecture: Architecture
    modules: dict[str, ModuleRecord] = Field(default_factory=dict)
    ties: dict[str, str] = Field(
        default_factory=dict, description="Tensor name -> the stored tensor it shares."
    )
