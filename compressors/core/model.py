"""The value passed from step to step: a network with its class, description and plan.

A recipe is a list of steps, a unit is a table or dense layer of a network, and a bundle is a model
as stored files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from compressors.contracts import Network, Plan
from compressors.core.state.tensor_files import TensorFile
from compressors.core.units import private_copy


@dataclass(frozen=True)
class Model:
    """A network in memory, between two steps of a recipe.

    Attributes:
        module: the network.
        architecture: the class that the network is built from.
        network: the description from which a bundle rebuilds the network.
        plan: one line per unit, with the steps so far; None before the first step.
        original: the network before the recipe, for steps that read its layers; not stored.
        files: by tensor name, the file of each tensor that is alone in a stored file, so that a
            step need not write it again.
    """

    module: nn.Module
    architecture: type[nn.Module]
    network: Network
    plan: Plan | None = None
    original: nn.Module | None = None
    files: Mapping[str, TensorFile] = field(default_factory=dict)

    def private(self) -> "Model":
        """Return the model with a copied module tree in eval mode that shares the tensors."""
        return replace(self, module=private_copy(self.module).eval())
