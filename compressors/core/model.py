"""The model passed between steps: a network with its description and plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from compressors.contracts import Network, Plan
from compressors.core.state.tensor_files import TensorFile
from compressors.core.units import private_copy


@dataclass(frozen=True)
class Model:
    """A loaded network: the module, the class it was built from, and what describes it.

    ``original`` is the network before the recipe, for steps that read its layers; it is not
    stored. ``files`` holds the file of each tensor that is alone in a stored file, so that a step
    need not write it again.
    """

    module: nn.Module
    architecture: type[nn.Module]
    network: Network
    plan: Plan | None = None
    original: nn.Module | None = None
    files: Mapping[str, TensorFile] = field(default_factory=dict)

    def private(self) -> "Model":
        """Return the model with a copied module tree that shares the same tensors, in eval mode."""
        return replace(self, module=private_copy(self.module).eval())
