"""A network as steps hand it to each other: the module, and all that describes it."""

from dataclasses import dataclass, replace

from torch import nn

from compressors.contracts import Network, Plan
from compressors.units import private_copy


@dataclass(frozen=True)
class Model:
    """A loaded network: the module, the class it was built from, and what describes it."""

    module: nn.Module
    architecture: type[nn.Module]
    network: Network
    plan: Plan | None = None

    def private(self) -> "Model":
        """The same model with a module tree of its own, over the same tensors."""
        return replace(self, module=private_copy(self.module).eval())
