"""A convolution of kernel size 1 as a dense layer, so that every dense method and target applies.

``nn.Conv1d(in, out, 1)`` maps each position of ``(rows, in, length)`` by the same matrix. It is the
``nn.Linear`` of the channels, as in the interaction network (CIN) of xDeepFM. The layer inside of
``PointwiseConv`` is an ordinary unit, with the name ``linear``.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord

POINTWISE = "pointwise"
"""Format, in bundles, of the record of a ``PointwiseConv``."""


class PointwiseConv(nn.Module):
    """Replacement of an ``nn.Conv1d``: float32 ``(*, in, length)`` to ``(*, out, length)``.

    Args:
        linear: the dense layer of the channels, plain or compressed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_channels, self.out_channels = linear.in_features, linear.out_features
        self.has_bias = linear.bias is not None
        self.kernel_size = self.stride = self.dilation = (1,)
        self.linear: nn.Module = linear

    @property
    def weight(self) -> Tensor:
        """The weight ``(out, in, 1)`` of the convolution; compressed layers have none."""
        weight: Any = self.linear.weight
        return weight.unsqueeze(-1)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Any:
        """The bias ``(out,)`` of the convolution, or None; compressed layers have none."""
        return self.linear.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        # Contiguous, because torch rounds products of strided inputs differently, and because
        # networks may call ``view`` on the output of a convolution.
        output: Tensor = self.linear(input.transpose(-1, -2).contiguous())  # (*, length, out)
        return output.transpose(-1, -2).contiguous()

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module, without its layer."""
        return ModuleRecord(
            kind="conv",
            format=POINTWISE,
            settings={
                "in_channels": self.in_channels,
                "out_channels": self.out_channels,
                "bias": self.has_bias,
            },
        )


def replace_pointwise_convs(model: nn.Module) -> nn.Module:
    """Replace each convolution of kernel size 1 by a ``PointwiseConv``, in place.

    The weights are shared with the convolution. Subclasses, convolutions with hooks, and those that
    share a tensor with another module are not replaced.

    Returns:
        The module.
    """
    users = Counter(id(p) for part in model.modules() for p in part.parameters(recurse=False))
    replaced: dict[nn.Module, PointwiseConv] = {}
    for module in list(model.modules()):
        if _is_pointwise(module) and all(users[id(p)] == 1 for p in module.parameters()):
            replaced[module] = _build_replacement(module)
    for parent in list(model.modules()):
        for child, part in list(parent._modules.items()):
            if part is not None and part in replaced:
                parent._modules[child] = replaced[part]
    return model


def _is_pointwise(module: nn.Module) -> bool:
    """Return whether a module computes what an ``nn.Linear`` of its channels computes."""
    return (
        type(module) is nn.Conv1d
        and module.kernel_size == module.stride == (1,)
        and module.padding in ((0,), "valid", "same")
        and module.groups == 1
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _build_replacement(conv: Any) -> PointwiseConv:
    """Return the replacement of a convolution, with views of its weights."""
    with torch.no_grad():
        linear = nn.Linear(1, 1, bias=conv.bias is not None, device="meta")
        linear.in_features, linear.out_features = conv.in_channels, conv.out_channels
        linear.weight = nn.Parameter(
            conv.weight.detach().squeeze(-1), requires_grad=conv.weight.requires_grad
        )
        linear.bias = conv.bias
    return PointwiseConv(linear).train(conv.training)
