"""The ONNX operators GRU and LSTM, computed by ``torch.gru`` and ``torch.lstm``.

The functions' parameters have the names of the ONNX inputs (in lower case) and attributes: ``w``
are the input weights, ``r`` the recurrent weights, ``b`` the biases, ``p`` the peephole weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compressors.lower.recurrent_layers import GRU_GATES, LSTM_GATES, to_torch_order

_ACTIVATIONS = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
"""The activations of one direction that torch computes; they are also the defaults of ONNX."""


def _require_supported(
    op: str,
    direction: str,
    activations: list[str] | None,
    layout: int,
    unsupported: Mapping[str, Any],
) -> None:
    """Raise ``NotImplementedError`` for attributes or inputs that torch does not support.

    Args:
        op: ``GRU`` or ``LSTM``.
        direction: the attribute of this name.
        activations: the attribute of this name.
        layout: the attribute of this name.
        unsupported: optional inputs and attributes that must be absent or 0, by name.
    """
    expected = _ACTIVATIONS[op] * (2 if direction == "bidirectional" else 1)
    if activations not in (None, expected):
        raise NotImplementedError(f"{op} with the activations {activations}")
    if direction == "reverse" or layout:
        raise NotImplementedError(f"{op} with direction {direction} and layout {layout}")
    if used := [n for n, value in unsupported.items() if isinstance(value, Tensor) or value]:
        raise NotImplementedError(f"{op} with {', '.join(used)}")


def _initial_state(state: Tensor | None, x: Tensor, w: Tensor, hidden_size: int) -> Tensor:
    """Return the initial state ``(directions, rows, hidden)``, zeros if the input is omitted."""
    return x.new_zeros(w.shape[0], x.shape[1], hidden_size) if state is None else state


def _onnx_output(output: Tensor, directions: int) -> Tensor:
    """Reshape the output ``(length, rows, directions * hidden)`` of torch to that of ONNX.

    Returns:
        The output ``(length, directions, rows, hidden)``.
    """
    length, rows, _ = output.shape
    return output.reshape(length, rows, directions, -1).transpose(1, 2)


def _gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
    linear_before_reset: int = 0,
    activations: list[str] | None = None,
    layout: int = 0,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    unsupported = {"sequence_lens": sequence_lens, "clip": clip}
    _require_supported("GRU", direction, activations, layout, unsupported)
    if not linear_before_reset:
        raise NotImplementedError("GRU without linear_before_reset")
    output, state = torch.gru(
        x,
        _initial_state(initial_h, x, w, hidden_size),
        to_torch_order(GRU_GATES, w, r, b),
        b is not None,
        num_layers=1,
        dropout=0.0,
        train=False,
        bidirectional=direction == "bidirectional",
        batch_first=False,
    )
    return _onnx_output(output, w.shape[0]), state


def _lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    hidden_size: int,
    direction: str = "forward",
    input_forget: int = 0,
    activations: list[str] | None = None,
    layout: int = 0,
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    unsupported = {"sequence_lens": sequence_lens, "P": p, "input_forget": input_forget}
    _require_supported("LSTM", direction, activations, layout, {**unsupported, "clip": clip})
    output, state, cell = torch.lstm(
        x,
        [_initial_state(initial, x, w, hidden_size) for initial in (initial_h, initial_c)],
        to_torch_order(LSTM_GATES, w, r, b),
        b is not None,
        num_layers=1,
        dropout=0.0,
        train=False,
        bidirectional=direction == "bidirectional",
        batch_first=False,
    )
    return _onnx_output(output, w.shape[0]), state, cell


RECURRENT: Mapping[str, Callable[..., Any]] = {"GRU": _gru, "LSTM": _lstm}
"""The functions of this file by the ONNX name of their operator."""
