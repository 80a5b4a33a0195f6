"""Hidden layers that several reference models share."""

from collections.abc import Sequence

from torch import nn


def build_perceptron(
    width: int, hidden: Sequence[int], *, dropout: float = 0.0, batch_norm: bool = False
) -> nn.Sequential:
    """Return linear layers, each followed by ReLU and dropout.

    Args:
        width: width of the input.
        hidden: widths of the layers; empty means the identity.
        dropout: dropout probability in training.
        batch_norm: whether a batch norm precedes every ReLU.
    """
    layers: list[nn.Module] = []
    for hidden_width in hidden:
        layers.append(nn.Linear(width, hidden_width))
        if batch_norm:
            layers.append(nn.BatchNorm1d(hidden_width))
        layers += [nn.ReLU(), nn.Dropout(dropout)]
        width = hidden_width
    return nn.Sequential(*layers)
