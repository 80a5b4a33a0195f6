"""Let recurrent layers call custom ops, which have an operator in ONNX.

``torch.export`` computes every position of a list by separate operators, so a graph accepts only
lists of one length. Here each layer and direction of a GRU, LSTM or RNN is one custom op, for lists
of any length, which ``recurrent.py`` translates.

A layer stacks the weights of its gates along the first dimension. torch has the order reset,
update, new for a GRU and input, forget, cell, output for an LSTM; ONNX has update, reset, new and
input, output, forget, cell (https://onnx.ai/onnx/operators/onnx__GRU.html). The custom ops take
ONNX's order.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

GRU_GATES, LSTM_GATES, RNN_GATES = (1, 0, 2), (0, 3, 1, 2), (0,)
"""For each gate in ONNX's order, its position in torch's order."""
GATES: dict[type[nn.Module], tuple[int, ...]] = {
    nn.GRU: GRU_GATES,
    nn.LSTM: LSTM_GATES,
    nn.RNN: RNN_GATES,
}
NAMES = ("onnx_input_weight", "onnx_state_weight", "onnx_bias")
"""Names of a layer's buffers with the weights in ONNX's order; a number follows."""


def replace_recurrent_layers(network: nn.Module) -> None:
    """Let the recurrent layers of a network call the custom ops of this file, in place.

    Subclasses, which may have another ``forward``, and LSTMs with projections, which ONNX lacks,
    are not changed.
    """
    for module in network.modules():
        gates = GATES.get(type(module))
        if gates is None or not isinstance(module, nn.RNNBase) or module.proj_size:
            continue
        for number, weights in enumerate(module.all_weights):
            for name, tensor in zip(NAMES, _to_onnx_order(gates, weights), strict=True):
                module.register_buffer(f"{name}_{number}", tensor, persistent=False)
        module.forward = MethodType(_forward, module)


def _to_onnx_order(gates: tuple[int, ...], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the weights ``(1, gates * hidden, *)`` and biases ``(1, 2 * gates * hidden)``."""
    input_weight, state_weight, *biases = weights
    zeros = input_weight.new_zeros(len(input_weight))
    ordered = [
        torch.cat([weight.detach().chunk(len(gates))[gate] for gate in gates])
        for weight in (input_weight, state_weight, *(biases or (zeros, zeros)))
    ]
    return ordered[0].unsqueeze(0), ordered[1].unsqueeze(0), torch.cat(ordered[2:]).unsqueeze(0)


def to_torch_order(
    gates: tuple[int, ...], input_weight: Tensor, state_weight: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """Return the weights of all directions as ``torch.gru`` and ``torch.lstm`` take them.

    Args:
        gates: ``GRU_GATES``, ``LSTM_GATES`` or ``RNN_GATES``.
        input_weight: ``(directions, gates * hidden, inputs)``, in ONNX's order of the gates.
        state_weight: ``(directions, gates * hidden, hidden)``.
        bias: ``(directions, 2 * gates * hidden)``; None for layers without biases.

    Returns:
        For each direction the two weights, and the two biases if there are any, in torch's order.
    """
    weights = []
    for direction in range(input_weight.shape[0]):
        biases = () if bias is None else bias[direction].chunk(2)
        for weight in (input_weight[direction], state_weight[direction], *biases):
            parts = weight.chunk(len(gates))
            weights.append(torch.cat([parts[gates.index(gate)] for gate in range(len(gates))]))
    return weights


def _forward(layer: nn.RNNBase, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Compute what ``layer.forward`` computes, with one custom op for each layer and direction.

    Args:
        layer: a GRU, LSTM or RNN.
        x: float32 ``(length, rows, inputs)``, or ``(rows, length, inputs)`` with ``batch_first``.
        state: the first states ``(layers * directions, rows, hidden)``; for an LSTM a pair of
            states and cells; None for zeros.

    Returns:
        The outputs ``(length, rows, directions * hidden)``, with dimensions in the order of ``x``,
        and the last states in the form of ``state``.
    """
    if isinstance(x, PackedSequence) or x.dim() != 3:
        unchanged: tuple[Tensor, Any] = type(layer).forward(layer, x, state)
        return unchanged
    steps = x.transpose(0, 1) if layer.batch_first else x
    states, cells = state if isinstance(layer, nn.LSTM) and state is not None else (state, None)
    directions = 2 if layer.bidirectional else 1
    last_states, last_cells = [], []
    for index in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            number, reverse = index * directions + direction, direction == 1
            state_of_number = None if states is None else states[number]
            weights = [getattr(layer, f"{name}_{number}") for name in NAMES]
            if isinstance(layer, nn.LSTM):
                cell = None if cells is None else cells[number]
                output, last_cell = lstm(steps, state_of_number, cell, *weights, reverse)
                last_cells.append(last_cell)
            elif isinstance(layer, nn.GRU):
                output = gru(steps, state_of_number, *weights, reverse)
            else:
                activation = str(layer.nonlinearity)
                output = rnn(steps, state_of_number, *weights, activation, reverse)
            outputs.append(output)
            last_states.append(output[0] if reverse else output[-1])
        steps = torch.cat(outputs, dim=2) if directions == 2 else outputs[0]
    result = steps.transpose(0, 1) if layer.batch_first else steps
    last = torch.stack(last_states)
    return result, (last, torch.stack(last_cells)) if last_cells else last


@torch.library.custom_op("recpress::gru", mutates_args=())
def gru(
    x: Tensor,
    state: Tensor | None,
    input_weight: Tensor,
    state_weight: Tensor,
    bias: Tensor,
    reverse: bool,
) -> Tensor:
    """Return the states of a GRU after each position: float32 ``(length, rows, hidden)``.

    Args:
        x: float32 ``(length, rows, inputs)``.
        state: the first state ``(rows, hidden)``; None for zeros.
        input_weight: ``(1, gates * hidden, inputs)``, in ONNX's order of the gates.
        state_weight: ``(1, gates * hidden, hidden)``.
        bias: ``(1, 2 * gates * hidden)``: that of the inputs, then that of the state.
        reverse: whether to start at the last position.
    """
    weights = to_torch_order(GRU_GATES, input_weight, state_weight, bias)
    first = _first_state(state, x, state_weight)
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    output = torch.gru(_flip(x, reverse), first, weights, True, 1, 0.0, False, False, False)[0]
    return _flip(output, reverse)


@torch.library.custom_op("recpress::lstm", mutates_args=())
def lstm(
    x: Tensor,
    state: Tensor | None,
    cell: Tensor | None,
    input_weight: Tensor,
    state_weight: Tensor,
    bias: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the states ``(length, rows, hidden)`` of an LSTM, and its last cell.

    The arguments are those of ``gru``; ``cell`` is the first cell ``(rows, hidden)``.
    """
    weights = to_torch_order(LSTM_GATES, input_weight, state_weight, bias)
    first = [_first_state(value, x, state_weight) for value in (state, cell)]
    output, _, last_cell = torch.lstm(  # the arguments after the weights: as in ``gru``
        _flip(x, reverse), first, weights, True, 1, 0.0, False, False, False
    )
    return _flip(output, reverse), last_cell[0]


@torch.library.custom_op("recpress::rnn", mutates_args=())
def rnn(
    x: Tensor,
    state: Tensor | None,
    input_weight: Tensor,
    state_weight: Tensor,
    bias: Tensor,
    activation: str,
    reverse: bool,
) -> Tensor:
    """Return the states of an RNN, as ``gru`` does; ``activation`` is ``tanh`` or ``relu``."""
    weights = to_torch_order(RNN_GATES, input_weight, state_weight, bias)
    run = torch.rnn_tanh if activation == "tanh" else torch.rnn_relu
    first = _first_state(state, x, state_weight)
    output = run(_flip(x, reverse), first, weights, True, 1, 0.0, False, False, False)[0]
    return _flip(output, reverse)


@gru.register_fake
@rnn.register_fake
def _states_like(x: Tensor, state: Tensor | None, *weights: Any) -> Tensor:
    hidden = weights[1].shape[2]  # of ``state_weight``
    return x.new_empty(x.shape[0], x.shape[1], hidden)


@lstm.register_fake
def _states_and_cell_like(
    x: Tensor, state: Tensor | None, cell: Tensor | None, *weights: Any
) -> tuple[Tensor, Tensor]:
    hidden = weights[1].shape[2]  # of ``state_weight``
    return x.new_empty(x.shape[0], x.shape[1], hidden), x.new_empty(x.shape[1], hidden)


def _first_state(state: Tensor | None, x: Tensor, state_weight: Tensor) -> Tensor:
    """Return the first state ``(1, rows, hidden)``, which is zero by default."""
    if state is None:
        return x.new_zeros(1, x.shape[1], state_weight.shape[2])
    return state.unsqueeze(0).contiguous()


def _flip(x: Tensor, reverse: bool) -> Tensor:
    """Return the positions ``(length, ...)``, in reverse order if ``reverse``."""
    return x.flip(0) if reverse else x
