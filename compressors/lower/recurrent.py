"""Translate the custom ops of recurrent layers to ONNX's GRU, LSTM and RNN, on every target.

The positional inputs of an ONNX operator are those of https://onnx.ai/onnx/operators: the sequence,
the weights of inputs and of states, the bias, ``sequence_lens`` (None: all have the full length)
and the first state (of an LSTM, also the first cell).
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset21 as op

from compressors.lower import recurrent_layers  # noqa: F401 - registers the custom ops


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the function that builds the operator of each op of ``recurrent_layers.py``."""
    ops = torch.ops.recpress
    return {
        ops.gru.default: _build_gru,
        ops.lstm.default: _build_lstm,
        ops.rnn.default: _build_rnn,
    }


def _build_gru(
    x: Any, state: Any, input_weight: Any, state_weight: Any, bias: Any, reverse: bool
) -> Any:
    states, _ = op.GRU(
        x,
        input_weight,
        state_weight,
        bias,
        None,
        _build_first(state),
        direction=_name_direction(reverse),
        hidden_size=int(state_weight.shape[2]),
        linear_before_reset=1,  # torch multiplies by the state's weight before the reset gate
    )
    return _build_outputs(states)


def _build_lstm(
    x: Any,
    state: Any,
    cell: Any,
    input_weight: Any,
    state_weight: Any,
    bias: Any,
    reverse: bool,
) -> tuple[Any, Any]:
    states, _, last_cell = op.LSTM(
        x,
        input_weight,
        state_weight,
        bias,
        None,
        _build_first(state),
        _build_first(cell),
        direction=_name_direction(reverse),
        hidden_size=int(state_weight.shape[2]),
    )
    return _build_outputs(states), op.Squeeze(last_cell, op.Constant(value_ints=[0]))


def _build_rnn(
    x: Any,
    state: Any,
    input_weight: Any,
    state_weight: Any,
    bias: Any,
    activation: str,
    reverse: bool,
) -> Any:
    states, _ = op.RNN(
        x,
        input_weight,
        state_weight,
        bias,
        None,
        _build_first(state),
        activations=[activation.capitalize()],
        direction=_name_direction(reverse),
        hidden_size=int(state_weight.shape[2]),
    )
    return _build_outputs(states)


def _build_first(state: Any) -> Any:
    """Build the first state ``(1, rows, hidden)`` of an operator; None for zeros."""
    return None if state is None else op.Unsqueeze(state, op.Constant(value_ints=[0]))


def _build_outputs(states: Any) -> Any:
    """Build the states ``(length, rows, hidden)`` from ``(length, 1, rows, hidden)``."""
    return op.Squeeze(states, op.Constant(value_ints=[1]))


def _name_direction(reverse: bool) -> str:
    return "reverse" if reverse else "forward"
