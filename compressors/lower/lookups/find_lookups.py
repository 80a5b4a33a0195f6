"""Find the lookups of tables in a traced program, and the column from which their ids come."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compressors.core.modules.formats import Bag, PackedTable
from compressors.lower.lookups.layout import Labels, layout_input, positions
from compressors.lower.lookups.program_editor import row_shape, shape_of

Table = PackedTable | nn.Embedding
_aten = torch.ops.aten


@dataclass(frozen=True)
class Lookup:
    """One operator that looks up rows of a table.

    Attributes:
        node: the operator; its output is float32 ``(*ids, dim)``.
        ids: the row numbers, of any shape.
        table: the table.
        name: name of the table in plans.
        is_only_use: whether the program reads the table by lookups only, not by a matmul.
    """

    node: fx.Node
    ids: fx.Node
    table: Table
    name: str
    is_only_use: bool


@dataclass(frozen=True)
class Column:
    """One column of a matrix, from which a lookup takes one id per row.

    Attributes:
        matrix: ``(rows, columns)``, or ``(rows,)`` with one column. Its values may be floats.
        index: index of the column.
    """

    matrix: fx.Node
    index: int


def find_lookups(graph: fx.Graph, stored: Mapping[fx.Node, int], module: nn.Module) -> list[Lookup]:
    """Return the lookups of a traced program in its order.

    Tables that are computed from other tables, or whose format needs several operators, have none.

    Args:
        graph: the operators of the program.
        stored: by input that is a stored tensor, the ``id`` of the tensor.
        module: a module that registers these tensors.
    """
    nodes: dict[int, list[fx.Node]] = {}
    for node, key in stored.items():
        nodes.setdefault(key, []).append(node)
    found = [
        lookup
        for name, table in module.named_modules()
        if isinstance(table, PackedTable | nn.Embedding)
        for lookup in _find_lookups_of(table, get_unit_name(module, name), nodes)
    ]
    order = {node: index for index, node in enumerate(graph.nodes)}
    unique = {lookup.node: lookup for lookup in found}  # a tied table has several names
    return sorted(unique.values(), key=lambda lookup: order[lookup.node])


def get_unit_name(module: nn.Module, name: str) -> str:
    """Return the name of a unit in plans: a table in an EmbeddingBag has the name of the bag.

    Args:
        module: the traced module, whose attribute ``model`` is the network; or the network.
        name: path of the unit in it.
    """
    parent_name, _, attribute = name.rpartition(".")
    is_in_bag = attribute == "table" and isinstance(module.get_submodule(parent_name), Bag)
    return (parent_name if is_in_bag else name).removeprefix("model.")


def _find_lookups_of(table: Table, name: str, nodes: dict[int, list[fx.Node]]) -> Iterator[Lookup]:
    stored = list(table.buffers() if isinstance(table, PackedTable) else table.parameters())
    inputs = [node for tensor in stored for node in nodes.get(id(tensor), [])]
    if len(inputs) != len(stored):
        return
    dim = table.dim if isinstance(table, PackedTable) else table.embedding_dim
    users = {user for node in inputs for user in node.users}
    found = [(user, ids) for user in users if (ids := _find_ids(user, inputs, dim)) is not None]
    for user, ids in found:
        yield Lookup(user, ids, table, name, is_only_use=len(found) == len(users))


def _find_ids(node: fx.Node, stored: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """Return the ids if a node looks up rows of a table in one operator, else None.

    Args:
        node: an operator.
        stored: the table's tensors, of which the operator must read all.
        dim: width of a row.
    """
    is_lookup = node.target is _aten.embedding.default or (
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "recpress"
    )
    others = [other for other in node.all_input_nodes if other not in stored]
    if not is_lookup or len(others) != 1 or not set(stored) <= set(node.all_input_nodes):
        return None
    (ids,) = others
    value = ids.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype.is_floating_point:
        return None
    return ids if shape_of(node) == (*shape_of(ids), dim) else None


def find_column(ids: fx.Node) -> Column | None:
    """Return the column from which ids come if there is one per row, else None.

    Operators that rearrange ids, and conversions to integers, do not change the column.
    """
    source = ids
    while (previous := _rearranged_or_converted(source)) is not None:
        source = previous
    shape = row_shape(source)
    if shape is None or len(shape) > 1:
        return None

    def find(node: fx.Node) -> Tensor | None:
        if node is source:
            return positions(shape)
        converted = _converted(node)
        return None if converted is None else labels.of(converted)

    labels = Labels(find)
    columns = labels.of(ids)
    if columns is None or columns.numel() != 1:
        return None
    return Column(source, int(columns))


def _rearranged_or_converted(node: fx.Node) -> fx.Node | None:
    return layout_input(node) or _converted(node)


def _converted(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a node converts to integers; None for other nodes."""
    if node.target not in {_aten.to.dtype, _aten._to_copy.default, _aten.to.device}:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or node.meta["val"].dtype not in {torch.int32, torch.int64}:
        return None
    return source
