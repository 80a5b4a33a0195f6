"""Find and replace the units of a network: its embedding tables and dense layers.

A packed table or layer has compressed weights (``PackedTable``, ``PackedLinear``). A ``Bag``
replaces an ``nn.EmbeddingBag``: it looks rows up in any table and reduces them. A ``TiedHead``
replaces a dense layer (output head) whose weight is the weight of a table.
"""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.factored import FACTORED, PARTS, FactoredLinear
from compressors.core.modules.formats import (
    Bag,
    FoldedNorm,
    PackedLinear,
    PackedTable,
)
from compressors.core.modules.table_weight import TIED, TiedHead
from compressors.core.state.plain_values import plain_tensors
from compressors.errors.steps import StepRefused

_PLAIN_TABLES = (nn.Embedding, nn.EmbeddingBag)
Role = Literal["table", "dense"]
"""What a unit is: an embedding table or a dense layer."""


@dataclass(frozen=True)
class Unit:
    """One table or dense layer of a network, as it is now.

    A composed table (built from smaller tables) or factored layer (a product of two smaller layers)
    is a unit without the tensors of its parts; each part is another unit.

    Attributes:
        name: the module's name in the network.
        role: embedding table or dense layer.
        module: the module.
        format: the name of its storage format; the dtype, such as ``float32``, if it is not
            compressed.
        bytes: bytes of its stored tensors. A tied weight counts for the first unit that has it, or
            for the table if an output head shares it.
        rows: rows of a table, or outputs of a dense layer.
        shared_with: the name of another module with the same weight, or None.
        shares_with_heads: whether ``shared_with`` and all other modules with the weight of this
            table are output heads. These multiply by the table, regardless of its format.
        part_of: the name of the outermost composed table or factored layer of which it is a part,
            or None.
    """

    name: str
    role: Role
    module: nn.Module
    format: str
    bytes: int
    rows: int
    shared_with: str | None
    part_of: str | None = None
    shares_with_heads: bool = False

    @staticmethod
    def of(model: nn.Module) -> tuple["Unit", ...]:
        """Return every table and dense layer of a module, in the order of its submodules."""
        return tuple(_walk(model))

    @property
    def weight(self) -> Tensor:
        """The float weight of a unit that is not compressed: ``(rows, dim)`` or ``(out, in)``.

        Raises:
            StepRefused: the unit is already compressed.
        """
        module = self.module.table if isinstance(self.module, Bag) else self.module
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.Linear):
            raise StepRefused("already_compressed", unit=self.name, format=self.format)
        return module.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """The float bias of a dense layer, or None."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


def innermost(name: str, units: Collection[str]) -> str | None:
    """Return the innermost of the units that contain ``name`` (a tensor or a part), or None."""
    return max((unit for unit in units if name.startswith(f"{unit}.")), key=len, default=None)


def folded_norms(module: nn.Module) -> tuple[str, ...]:
    """Return the names of norms that were folded into adjacent layers."""
    return tuple(name for name, part in module.named_modules() if isinstance(part, FoldedNorm))


def table_rows(module: nn.Module) -> dict[str, int]:
    """Return the number of rows of every table, by table name."""
    return {unit.name: unit.rows for unit in Unit.of(module) if unit.role == "table"}


def stored_bytes(module: nn.Module, counted: Collection[int] = ()) -> int:
    """Return the bytes of a module's state dict; a shared tensor counts once.

    Non-persistent buffers are not included, nor are tensors whose Python ids are in ``counted``.
    """
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in counted)


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module ``name`` by ``new``, under every name that registers the module.

    Output heads whose weight is that of a replaced table multiply by the new table afterwards.
    """
    old = model.get_submodule(name)
    heads = _build_heads(model, old, name)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                parent._modules[child] = new
            elif module in heads:
                parent._modules[child] = heads[module]
    for module in model.modules():
        if isinstance(module, TiedHead) and module.table is old:
            module.set_table(new)


def _build_heads(model: nn.Module, table: nn.Module, name: str) -> dict[nn.Module, TiedHead]:
    """Return the replacement of each dense layer whose weight is that of a plain table."""
    plain = table.table if isinstance(table, Bag) else table
    if not isinstance(plain, _PLAIN_TABLES):
        return {}
    shape = (plain.num_embeddings, plain.embedding_dim)
    return {
        module: TiedHead(table, module.bias, name, shape)
        for module in model.modules()
        if type(module) is nn.Linear and module.weight is plain.weight
    }


def pack_table(old: nn.Module, table: nn.Module) -> nn.Module:
    """Wrap ``table`` in a ``Bag`` if it replaces an ``nn.EmbeddingBag``; else return it."""
    if isinstance(old, nn.EmbeddingBag):
        return Bag(
            table,
            mode=old.mode,
            padding_idx=old.padding_idx,
            include_last_offset=old.include_last_offset,
        )
    return table


def plain_bag(old: nn.EmbeddingBag, longest: int | None = None) -> Bag:
    """Convert an ``nn.EmbeddingBag`` to a ``Bag`` (lookup and reduction) with the same weight.

    ``longest`` is the largest number of ids of one bag; only the export of jagged input needs it.
    """
    table = nn.Embedding(1, 1)  # its weight is replaced below: no large tensor is allocated
    table.num_embeddings, table.embedding_dim = old.num_embeddings, old.embedding_dim
    table.weight = old.weight
    return Bag(
        table,
        mode=old.mode,
        padding_idx=old.padding_idx,
        include_last_offset=old.include_last_offset,
        longest=longest,
    )


def private_copy(model: nn.Module) -> nn.Module:
    """Copy the module tree but share its tensors, so that no table is in memory twice.

    Parameters in Python lists and dictionaries, which torch does not register, are shared too: a
    module may still refer to the weight of a table that a packed table replaced.
    """
    listed = (tensor for _, tensor in plain_tensors(model) if isinstance(tensor, nn.Parameter))
    tensors = (*model.parameters(), *model.buffers(), *listed)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _walk(model: nn.Module) -> Iterator[Unit]:
    """Yield every unit of a module, in the order of its submodules."""
    users: dict[int, list[nn.Module]] = {}  # by id of a parameter, the modules that have it
    names: dict[nn.Module, str] = {}  # of a bag's table, the name of the bag
    for name, module in model.named_modules():
        names.setdefault(module, name)
        if isinstance(module, Bag):
            names[module.table] = name
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    bag_tables: set[nn.Module] = set()  # tables of the bags so far; a bag and its table are a unit
    owners: dict[nn.Module, str] = {}  # by part of a unit, the name of its outermost unit
    # Ids of tensors whose bytes were counted: those of a tied weight count for its first unit.
    counted: set[int] = set()
    for name, module in model.named_modules():
        description = None if module in bag_tables else _describe(name, module)
        if description is None:
            continue
        role, form, rows = description
        table = module
        if isinstance(module, Bag):
            table = module.table
            bag_tables.add(table)
        if isinstance(table, ComposedTable):
            whole = owners.get(module, name)
            owners.update((table.get_submodule(part), whole) for part in table.part_names)
            size = sum(tensor.nbytes for tensor in table.buffers(recurse=False))
            part_of = owners.get(module)
            yield Unit(name, role, module, form, size, rows, shared_with=None, part_of=part_of)
            continue
        if isinstance(module, FactoredLinear):
            whole = owners.get(module, name)
            owners.update((module.get_submodule(part), whole) for part in PARTS)
            part_of = owners.get(module)  # all tensors of a factored layer are those of its parts
            yield Unit(name, role, module, form, 0, rows, shared_with=None, part_of=part_of)
            continue
        if isinstance(module, TiedHead):
            size = stored_bytes(module)
            yield Unit(name, role, module, form, size, rows, shared_with=module.table_name)
            continue
        same_unit = {module, table}
        sharing = [
            user
            for parameter in module.parameters()
            for user in users[id(parameter)]
            if user not in same_unit
        ]
        shared = [names[user] for user in sharing]
        tensors = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        if role == "dense" and any(isinstance(user, _PLAIN_TABLES) for user in sharing):
            form = TIED
            tensors.discard(id(module.weight))  # its bytes count for the table
            size = 0 if module.bias is None else module.bias.nbytes
        else:
            size = stored_bytes(module, counted)
        counted |= tensors
        yield Unit(
            name,
            role,
            module,
            form,
            size,
            rows,
            shared_with=next(iter(shared), None),
            part_of=owners.get(module),
            shares_with_heads=bool(sharing) and all(type(user) is nn.Linear for user in sharing),
        )


def _describe(name: str, module: nn.Module) -> tuple[Role, str, int] | None:
    """Return a unit's role, format and rows (outputs of a dense layer); None for other modules."""
    match module:
        case Bag(table=nn.Embedding() as table):
            return "table", _name_dtype(table.weight), table.num_embeddings
        case Bag(table=PackedTable() as packed):
            return "table", packed.storage.name, packed.rows
        case Bag(table=ComposedTable() as composed):
            return "table", composed.composition.name, composed.rows
        case ComposedTable():
            return "table", module.composition.name, module.rows
        case PackedTable():
            return "table", module.storage.name, module.rows
        case FactoredLinear():
            return "dense", FACTORED, module.out_features
        case PackedLinear():
            return "dense", module.storage.name, module.out_features
        case TiedHead():
            return "dense", TIED, module.out_features
        case nn.Embedding() | nn.EmbeddingBag():
            if module.max_norm is not None:
                raise StepRefused("table_renormalizes", table=name)
            return "table", _name_dtype(module.weight), module.num_embeddings
        case nn.Linear():
            return "dense", _name_dtype(module.weight), module.out_features
    return None


def _name_dtype(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """Replace a parameter of a private copy by a new one, and return it.

    The previous parameter, which the copy (``private_copy``) shares with the original model, is not
    modified.
    """
    parameter = nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
    setattr(module, name, parameter)
    return parameter
