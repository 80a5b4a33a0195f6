"""A dense layer made of two smaller ones, as a composed table is made of smaller tables.

``reduce`` takes the inputs to ``rank`` numbers and has no bias, ``expand`` takes these to the
outputs. Both are plain Linear layers when they are made, and units like any other: a later step of
the recipe packs or trains them, each with a line of its own in the plan, so that "rank 32, then
int8" needs no method of its own.
"""

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.core.modules.formats import TensorSpec

FACTORED = "factored"
PARTS = ("reduce", "expand")


class FactoredLinear(nn.Module):
    """What replaces an ``nn.Linear``: float32 ``(*, in)`` in, ``(*, out)`` out."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        stored: dict[str, Tensor] | None = None,
    ) -> None:
        """Make one from its tensors, or, without them, an empty one on the meta device.

        Args:
            in_features: of the whole layer.
            out_features: of the whole layer.
            rank: numbers between the two.
            bias: whether ``expand`` has one.
            stored: float32 tensors by the names of ``factored_layout``.
        """
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.has_bias = bias
        self.reduce = nn.Linear(in_features, rank, bias=False, device="meta")
        self.expand = nn.Linear(rank, out_features, bias=bias, device="meta")
        for name, spec in factored_layout(in_features, out_features, rank, bias=bias).items():
            if stored is None:
                continue
            if tuple(stored[name].shape) != spec.shape:
                raise ValueError(f"{name} of {spec.shape} was given {tuple(stored[name].shape)}")
            owner, _, leaf = name.partition(".")
            weight = nn.Parameter(stored[name].detach(), requires_grad=False)
            setattr(self.get_submodule(owner), leaf, weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        output: Tensor = self.expand(self.reduce(input))
        return output

    def record(self) -> ModuleRecord:
        """What a bundle must say so that this module can be built again; parts have their own."""
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


def factored_layout(inputs: int, outputs: int, rank: int, *, bias: bool) -> dict[str, TensorSpec]:
    """The tensors of both parts."""
    layout = {
        "reduce.weight": TensorSpec((rank, inputs), torch.float32),
        "expand.weight": TensorSpec((outputs, rank), torch.float32),
    }
    if bias:
        layout["expand.bias"] = TensorSpec((outputs,), torch.float32)
    return layout
