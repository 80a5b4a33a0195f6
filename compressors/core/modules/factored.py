"""Factored dense layer: an ``nn.Linear`` replaced by the product of two smaller ones.

``reduce`` maps the inputs to ``rank`` features and has no bias; ``expand`` maps these to the
outputs. Both are plain Linear layers at first, and ordinary units: a later step of the recipe can
compress or train each one, with a separate line in the plan. So a low-rank layer with int8 parts
needs no combined method.
"""

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.core.modules.formats import TensorSpec

FACTORED = "factored"
"""Name of the format in plans and bundles."""
PARTS = ("reduce", "expand")
"""Names of the two submodules."""


class FactoredLinear(nn.Module):
    """Low-rank replacement of an ``nn.Linear``: float32 ``(*, in)`` to ``(*, out)``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        stored: dict[str, Tensor] | None = None,
    ) -> None:
        """Build the layer from its tensors, or with empty tensors on the meta device if None.

        Args:
            in_features: inputs of the whole layer.
            out_features: outputs of the whole layer.
            rank: features between ``reduce`` and ``expand``.
            bias: whether ``expand`` has a bias.
            stored: float32 tensors, with the names and shapes of ``describe_factored_layout``.

        Raises:
            ValueError: a tensor has another shape.
        """
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.has_bias = bias
        self.reduce = nn.Linear(in_features, rank, bias=False, device="meta")
        self.expand = nn.Linear(rank, out_features, bias=bias, device="meta")
        for name, spec in describe_factored_layout(
            in_features, out_features, rank, bias=bias
        ).items():
            if stored is None:
                continue
            if tuple(stored[name].shape) != spec.shape:
                raise ValueError(f"{name} of {spec.shape} was given {tuple(stored[name].shape)}")
            part, _, parameter_name = name.partition(".")
            weight = nn.Parameter(stored[name].detach(), requires_grad=False)
            setattr(self.get_submodule(part), parameter_name, weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        output: Tensor = self.expand(self.reduce(input))
        return output

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module, without its parts."""
        return ModuleRecord(
            kind="linear",
            format=FACTORED,
            settings={
                "in_features": self.in_features,
                "out_features": self.out_features,
                "rank": self.rank,
                "bias": self.has_bias,
            },
        )


def describe_factored_layout(
    inputs: int, outputs: int, rank: int, *, bias: bool
) -> dict[str, TensorSpec]:
    """Return the shape and dtype of the tensors of both parts, by name."""
    layout = {
        "reduce.weight": TensorSpec((rank, inputs), torch.float32),
        "expand.weight": TensorSpec((outputs, rank), torch.float32),
    }
    if bias:
        layout["expand.bias"] = TensorSpec((outputs,), torch.float32)
    return layout
