"""A network as steps hand it to each other: the module, and all that describes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from compressors.contracts import Network, Plan
from compressors.contracts.reasons import Reason
from compressors.core.units import private_copy


@dataclass(frozen=True)
class Model:
    """A loaded network: the module, the class it was built from, and what describes it.

    ``notes`` holds, by unit, what a step measured while it worked; its plan line has these reasons
    after those of the choice. ``original`` is the network the recipe began with, for steps that
    read its layers; nothing of it is stored.
    """

    module: nn.Module
    architecture: type[nn.Module]
    network: Network
    plan: Plan | None = None
    notes: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)
    original: nn.Module | None = None

    def private(self) -> "Model":
        """The same model with a module tree of its own, over the same tensors."""
        return replace(self, module=private_copy(self.module).eval())
