"""The dataflow between a network's layers and norms, read from its ``torch.export`` graph.

Steps that move factors or offsets from one layer into the next need it. Such a move is correct only
if nothing else reads the tensor between the two layers, and if the operators between them preserve
the change: a positive factor passes through a Relu, an offset does not. Lowering exports the same
graph. In this graph a layer is an operator (``aten.linear``) with the weight as an argument, so the
graph also shows code that reads the weight without calling the layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from compressors.contracts import Signature, is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.core.random_inputs import generate_inputs
from compressors.core.units import table_rows
from compressors.errors.steps import StepRefused
from compressors.errors.widths import OtherConsumer
from compressors.lower.serving_wrapper import input_names, served_graphs, wrap_for_serving

TRACE_ROWS = 3  # of the generated inputs; the graph does not depend on them
_aten = torch.ops.aten
_WEIGHT_POSITIONS: dict[Any, tuple[int, ...]] = {  # operator -> positions of its weights
    _aten.linear.default: (1, 2),
    _aten.batch_norm.default: (1, 2, 3, 4),
    _aten.layer_norm.default: (2, 3),
    _aten.rms_norm.default: (2,),
}
_IDENTITIES = {_aten.dropout.default, _aten.contiguous.default, _aten.clone.default}
_IDENTITIES |= {_aten.alias.default, _aten.detach.default, _aten.dropout_.default}
_NONLINEARITIES: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.relu_.default: "relu",
    _aten.leaky_relu.default: "leaky_relu",
    _aten.leaky_relu_.default: "leaky_relu",
    _aten.prelu.default: "prelu",
    _aten.abs.default: "abs",
}
_CLAMPS = {_aten.clamp.default, _aten.clamp_min.default}  # at zero, from below only
_RESHAPES = {_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints}
_RESHAPES |= {_aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default}
_SELECTIONS = {_aten.select.int, _aten.slice.Tensor}
_METADATA_READS = {_aten._assert_tensor_metadata.default, _aten.sym_size.int}


@dataclass(frozen=True)
class Consumer:
    """A layer or norm that consumes another's output.

    Attributes:
        name: name of the layer or norm.
        nonlinearities: names of the nonlinear operators between the two. They are elementwise and
            positively homogeneous: ``f(s x) = s f(x)`` for ``s > 0``. If there are none, the output
            arrives unchanged.
    """

    name: str
    nonlinearities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataflow:
    """The consumers of each layer's and norm's output.

    Attributes:
        consumers: by name of a layer or norm, all consumers of its output. A layer or norm is
            included only if its weights may be changed, and if every consumer is a layer or norm
            whose weights may be changed.
        reasons: by name of each other layer or norm, the reason why it is not in ``consumers``.
        fixed_reasons: by name of each layer or norm whose weights may not be changed, the reason.
        input_dims: by name of each called layer or norm, the number of dimensions of its input.
    """

    consumers: Mapping[str, tuple[Consumer, ...]]
    reasons: Mapping[str, Reason]
    fixed_reasons: Mapping[str, Reason]
    input_dims: Mapping[str, int]

    def find_exclusive_producer(self, name: str) -> str | None:
        """Return the layer or norm whose output only ``name`` reads, unchanged; else None."""
        for producer, consumers in self.consumers.items():
            if consumers == (Consumer(name),):
                return producer
        return None

    def direct_consumers(self, name: str) -> tuple[str, ...]:
        """Return all consumers of an output if they receive it unchanged; otherwise ``()``."""
        consumers = self.consumers.get(name, ())
        if any(consumer.nonlinearities for consumer in consumers):
            return ()
        return tuple(consumer.name for consumer in consumers)


def dataflow(module: nn.Module, signature: Signature) -> Dataflow:
    """Trace the dataflow of a network in evaluation mode.

    Args:
        module: plain or compressed; not modified. Compressed layers are not in the result.
        signature: describes the inputs of the network.

    Raises:
        StepRefused: ``torch.export`` cannot trace the network.
    """
    owners = find_owners(module)
    consumers: dict[str, tuple[Consumer, ...]] = {}
    reasons: dict[str, Reason] = {}
    fixed_reasons: dict[str, Reason] = {}
    input_dims: dict[str, int] = {}
    for graph, placeholders in export_graphs(module, signature):
        called = find_called_modules(
            graph, {node: owners.get(key, set()) for node, key in placeholders.items()}
        )
        fixed_reasons |= _find_used_elsewhere(placeholders, owners, called)
        for node, name in called.items():
            if name in input_dims:
                fixed_reasons[name] = Reason("called_again")
                continue
            input_dims[name] = _fake_output(node.args[0]).dim()
            try:
                consumers[name] = tuple(_find_consumers(node, called, ()))
            except OtherConsumer as fault:
                reasons[name] = fault.reason
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and name not in input_dims:
            fixed_reasons.setdefault(name, Reason("not_called"))
    for name, consumers_of_output in consumers.items():
        if fixed_consumer := next(
            (consumer.name for consumer in consumers_of_output if consumer.name in fixed_reasons),
            None,
        ):
            reasons[name] = Reason(
                "consumer_fixed", consumer=fixed_consumer, why=fixed_reasons[fixed_consumer]
            )
    reasons |= fixed_reasons
    changeable = {name: value for name, value in consumers.items() if name not in reasons}
    return Dataflow(changeable, reasons, fixed_reasons, input_dims)


def find_owners(module: nn.Module) -> dict[int, set[str]]:
    """Return the names of the modules that register each tensor, by the ``id`` of the tensor."""
    owners: dict[int, set[str]] = {}
    for name, part in module.named_modules():
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            owners.setdefault(id(tensor), set()).add(name)
    return owners


def export_graphs(
    module: nn.Module, signature: Signature, *, functional: bool = False
) -> list[tuple[torch.fx.Graph, dict[Node, int]]]:
    """Export each served graph; map its weight placeholders to the ``id`` of their tensors.

    Args:
        module: the network.
        signature: its inputs.
        functional: replace in-place operators, so that no operator changes an earlier tensor.

    Raises:
        StepRefused: ``torch.export`` cannot trace the network.
    """
    rows = table_rows(module)
    graphs = []
    for served_graph in served_graphs(signature):  # one, or one per tower of a retrieval model
        wrapper = wrap_for_serving(module, served_graph, rows)
        inputs = generate_inputs(served_graph.signature, rows, TRACE_ROWS)
        names = input_names(served_graph.signature)
        dynamic = tuple({0: torch.export.Dim.AUTO} for _ in names)
        try:
            with torch.no_grad():
                program = torch.export.export(
                    wrapper, tuple(inputs[name] for name in names), dynamic_shapes=(dynamic,)
                )
        except Exception as fault:  # tracing runs the network's code, which may raise anything
            if is_out_of_memory(fault):
                raise
            problem = (str(fault).strip().splitlines() or [repr(fault)])[0].rstrip(".")
            raise StepRefused("network_not_traceable", problem=problem) from fault
        if functional:
            program = program.run_decompositions({})
        tensors: dict[str, Tensor] = dict(wrapper.named_parameters(remove_duplicate=False))
        tensors |= dict(wrapper.named_buffers(remove_duplicate=False))
        exported = program.graph_signature
        tensor_names = {**exported.inputs_to_parameters, **exported.inputs_to_buffers}
        placeholders = {
            node: id(tensors[tensor_names[node.name]])
            for node in program.graph.nodes
            if node.op == "placeholder" and tensor_names.get(node.name) in tensors
        }
        graphs.append((program.graph, placeholders))
    return graphs


def find_called_modules(graph: torch.fx.Graph, owners: Mapping[Node, set[str]]) -> dict[Node, str]:
    """Return the linear and norm operators of a graph, each with the module that owns its weights.

    Args:
        graph: an exported graph.
        owners: by placeholder of a weight, the names of the modules that register the weight.
    """
    called = {}
    for node in graph.nodes:
        positions = _WEIGHT_POSITIONS.get(node.target, ())
        if node.target is _aten.linear.default and node.args[1] not in owners:
            continue  # its weight is computed in the graph
        weights = [node.args[index] for index in positions if len(node.args) > index]
        modules = {
            name for weight in weights if weight is not None for name in owners.get(weight, ())
        }
        if len(modules) == 1:
            called[node] = modules.pop()
    return called


def _find_used_elsewhere(
    placeholders: Mapping[Node, int], owners: Mapping[int, set[str]], called: Mapping[Node, str]
) -> dict[str, Reason]:
    """Return the layers and norms whose tensors other code reads or shares, with the reason.

    Args:
        placeholders: by placeholder of a weight, the ``id`` of its tensor.
        owners: by ``id`` of a tensor, the names of the modules that register it.
        called: the linear and norm operators of the graph, with their modules.
    """
    reasons = {}
    for node, key in placeholders.items():
        for name in owners.get(key, ()):
            if not node.users or name not in called.values():
                continue
            others = owners[key] - {name}
            if others:
                reasons[name] = Reason("shares_tensor", other=min(others))
            elif any(called.get(user) != name for user in node.users):
                reasons[name] = Reason("weight_read_elsewhere")
    for key, names in owners.items():  # a tied tensor has one placeholder, under any of its names
        if len(names) > 1 and key in placeholders.values():
            for name in names:
                reasons[name] = Reason("shares_tensor", other=min(names - {name}))
    return reasons


def _find_consumers(
    node: Node, called: Mapping[Node, str], nonlinearities: tuple[str, ...]
) -> list[Consumer]:
    """Find the consumers of a node's output.

    Args:
        node: a node of the graph.
        called: the linear and norm operators of the graph, with their modules.
        nonlinearities: nonlinear operators between the layer and this node.

    Raises:
        OtherConsumer: an operator or an output of the network consumes it.
    """
    result: list[Consumer] = []
    for user in node.users:
        if user.target in _METADATA_READS:
            continue
        if user in called and user.args[0] is node and node not in user.args[1:]:
            result.append(Consumer(called[user], nonlinearities))
        elif _preserves_channels(user, node):
            operator = "clamp" if user.target in _CLAMPS else _NONLINEARITIES.get(user.target)
            new = () if operator is None else (operator,)
            result += _find_consumers(user, called, (*nonlinearities, *new))
        elif user.op == "output":
            raise OtherConsumer(Reason("output_leaves"))
        else:
            raise OtherConsumer(Reason("output_enters", operator=_name_operator(user.target)))
    return result


def _preserves_channels(node: Node, source: Node) -> bool:
    """Whether an operator keeps channels (last dimension) in place and preserves factors > 0.

    Args:
        node: the operator.
        source: its input.
    """
    if node.args[0] is not source or source in node.args[1:]:
        return False
    if node.target in _IDENTITIES or node.target in _NONLINEARITIES:
        return True
    before, after = _fake_output(source), _fake_output(node)
    if node.target in _RESHAPES:  # in memory order: the last size alone determines the columns
        return before.dim() > 0 and after.dim() > 0 and before.shape[-1] == after.shape[-1]
    if node.target in _SELECTIONS:
        dim = node.args[1] if len(node.args) > 1 else 0
        return isinstance(dim, int) and dim % before.dim() != before.dim() - 1
    if node.target is _aten.to.dtype:
        return before.dtype == after.dtype
    return node.target in _CLAMPS and tuple(node.args[1:]) == (0,)


def _fake_output(node: Any) -> Tensor:
    """Return the fake tensor (shape and dtype without values) of a node's output."""
    value: Tensor = node.meta["val"]
    return value


def _name_operator(target: Callable[..., Any] | str) -> str:
    return str(target).removeprefix("aten.").partition(".")[0]
