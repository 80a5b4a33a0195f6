"""The model passed between steps: a network with its description and plan."""

from dataclasses import dataclass, replace

from torch import nn

from compressors.contracts import Network, Plan
from compressors.core.units import private_copy


@dataclass(frozen=True)
class Model:
    """A loaded network: the module, the class it was built from, and what describes it.

    ``original`` is the network before the recipe, for steps that read its
    layers; it is not stored.
    """

    module: nn.Module
    architecture: type[nn.Module]
    network: Network
    plan: Plan | None = None
    original: nn.Module | None = None

    def private(self) -> "Model":
        """Return the model with a copied module tree that shares the same tensors, in eval mode."""
        return replace(self, module=private_copy(self.module).eval())
