"""Change the program that ``torch.export`` traced, before it is translated to ONNX.

Such a program is a graph of operators. Its inputs are the stored tensors of the module and, after
them, the tensors of a request. Each operator has an example of its output, which has a shape and a
dtype but no values; the number of rows is a symbol in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

EXAMPLE_SIZE = 3
"""Smallest dynamic size of the example with which an inserted module is traced."""
_WITHOUT_EFFECT = {torch.ops.aten._assert_tensor_metadata.default}
"""Operators that only check a tensor. They would keep tensors that nothing else reads."""


class ProgramEditor:
    """Adds operators and stored tensors to a program.

    Attributes:
        program: the program, which is changed in place.
        graph: its operators.
        tensors: the stored tensor of each input that is one.
    """

    def __init__(self, program: torch.export.ExportedProgram, module: nn.Module) -> None:
        """Read a program.

        Args:
            program: the program.
            module: the module from which it was traced.
        """
        self.program = program
        self.graph = program.graph
        named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        named |= dict(module.named_buffers(remove_duplicate=False))
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.tensors = {
            node: named[names[node.name]] for node in inputs if names.get(node.name) in named
        }
        self._first_input = inputs[0]
        examples = (node.meta.get("val") for node in inputs)
        self._mode = next(value.fake_mode for value in examples if isinstance(value, FakeTensor))

    def add_tensor(self, name: str, tensor: Tensor) -> fx.Node:
        """Add a stored tensor; ``name`` will be the name of its initializer."""
        with self.graph.inserting_before(self._first_input):
            node: fx.Node = self.graph.placeholder("stored_" + name.replace(".", "_"))
        node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)
        self.program.graph_signature.input_specs.insert(0, spec)
        self.program.state_dict[name] = tensor
        self.tensors[node] = tensor
        self._first_input = node
        return node

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Add operators after ``node``, or after all inputs if it is one, in the order of calls."""
        if node.op == "placeholder":
            node = next(other for other in self.graph.nodes if other.op != "placeholder")
            with self.graph.inserting_before(node):
                yield
        else:
            with self.graph.inserting_before(node.next):
                yield

    def call(self, operator: Any, *args: Any, **options: Any) -> fx.Node:
        """Add an operator at the current place, and compute the example of its output."""
        node: fx.Node = self.graph.call_function(operator, args, options)
        examples = fx.node.map_arg(args, lambda other: other.meta["val"])
        with self._mode, torch.no_grad():
            node.meta["val"] = operator(*examples, **options)
        return node

    def insert(self, module: nn.Module, argument: fx.Node, name: str) -> fx.Node:
        """Add the operators of a module at the current place.

        Args:
            module: a module with one input.
            argument: the module's input.
            name: prefix of the names of the module's stored tensors in the program.

        Returns:
            The module's output.
        """
        shape = shape_of(argument)
        dynamic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        # Each dynamic size has another example, because torch would not distinguish equal ones.
        sizes = [
            EXAMPLE_SIZE + axis if axis in dynamic else shape[axis] for axis in range(len(shape))
        ]
        with torch.no_grad():
            traced = torch.export.export(
                module,
                (torch.zeros(sizes, dtype=dtype_of(argument)),),
                dynamic_shapes=(dict.fromkeys(dynamic, torch.export.Dim.AUTO),),
            )
        known = {id(tensor): node for node, tensor in self.tensors.items()}
        tensors = {**traced.constants, **module.state_dict(keep_vars=True)}
        added: dict[fx.Node, fx.Node] = {}
        specs = iter(traced.graph_signature.input_specs)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                spec = next(specs)
                if spec.kind == InputKind.USER_INPUT:
                    added[node] = argument
                else:
                    tensor = tensors[str(spec.target)]
                    added[node] = known.get(id(tensor)) or self.add_tensor(
                        f"{name}.{spec.target}", tensor
                    )
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, added.__getitem__)
                added[node] = self.call(node.target, *args, **node.kwargs)
        (result,) = [node for node in traced.graph.nodes if node.op == "output"]
        ((output,),) = result.args
        return added[output]

    def finish(self) -> None:
        """Remove operators whose outputs nothing reads, and check the program."""
        for node in list(self.graph.nodes):
            if node.target in _WITHOUT_EFFECT:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        (result,) = [node for node in self.graph.nodes if node.op == "output"]
        outputs: Any = result.args[0]
        for spec, node in zip(self.program.graph_signature.output_specs, outputs, strict=True):
            spec.arg = TensorArgument(node.name)  # an output may be another operator than before
        self.program.graph_module.recompile()
        self.program.validate()  # type: ignore[no-untyped-call]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node's output; the number of rows is a symbol."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the dtype of a node's output."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def row_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's output without the first dimension; None if it is not fixed."""
    shape = shape_of(node)[1:]
    return shape if shape_of(node) and all(isinstance(size, int) for size in shape) else None
