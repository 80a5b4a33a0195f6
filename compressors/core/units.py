"""Units, the tables and dense layers of a module: find and replace them."""

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
from compressors.core.state.plain_values import plain_tensors
from compressors.errors.steps import StepRefused

Role = Literal["table", "dense"]


@dataclass(frozen=True)
class Unit:
    """One table or dense layer in the present state of a module.

    A composed table or factored layer is a unit without the tensors of its parts; each part is
    another unit whose ``part_of`` names the outermost one.
    """

    name: str
    role: Role
    module: nn.Module
    format: str
    bytes: int
    rows: int
    shared_with: str | None
    part_of: str | None = None

    @staticmethod
    def of(model: nn.Module) -> tuple["Unit", ...]:
        """Return every table and dense layer of a module, in the order of its submodules."""
        return tuple(_walk(model))

    @property
    def weight(self) -> Tensor:
        """The float weight of a unit that is not compressed: ``(rows, dim)`` or ``(out, in)``."""
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
    """Return the innermost of some units that contains the tensor or part ``name``, or None."""
    return max((unit for unit in units if name.startswith(f"{unit}.")), key=len, default=None)


def folded_norms(module: nn.Module) -> tuple[str, ...]:
    """Return the names of norms that were folded into adjacent layers."""
    return tuple(name for name, part in module.named_modules() if isinstance(part, FoldedNorm))


def table_rows(module: nn.Module) -> dict[str, int]:
    """Return the rows of every table, by table name."""
    return {unit.name: unit.rows for unit in Unit.of(module) if unit.role == "table"}


def stored_bytes(module: nn.Module, counted: Collection[int] = ()) -> int:
    """Return the bytes of a module's state dict, shared tensors counted once.

    Non-persistent buffers and tensors whose ids are in ``counted`` are not included.
    """
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in counted)


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module ``name`` by ``new`` under every name it is registered with."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                parent._modules[child] = new


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
    """Convert an ``nn.EmbeddingBag`` to a ``Bag`` (lookup and reduction) with the same weight."""
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
    """Copy the module tree and share its tensors, so that no table is in memory twice.

    Parameters in plain lists are shared too: they may belong to tables replaced by packed ones.
    """
    listed = (tensor for _, tensor in plain_tensors(model) if isinstance(tensor, nn.Parameter))
    tensors = (*model.parameters(), *model.buffers(), *listed)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _walk(model: nn.Module) -> Iterator[Unit]:
    users: dict[int, list[nn.Module]] = {}
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names[module] = name
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    inside: set[nn.Module] = set()
    owners: dict[nn.Module, str] = {}  # of each table inside a composed one
    counted: set[int] = set()  # a tied weight's bytes count for the first unit that has it
    for name, module in model.named_modules():
        described = None if module in inside else _describe(name, module)
        if described is None:
            continue
        table = module
        if isinstance(module, Bag):
            table = module.table
            inside.add(table)
        if isinstance(table, ComposedTable):
            whole = owners.get(module, name)
            owners.update((table.get_submodule(part), whole) for part in table.part_names)
            size = sum(tensor.nbytes for tensor in table.buffers(recurse=False))
            role, form, rows = described
            yield Unit(name, role, module, form, size, rows, None, owners.get(module))
            continue
        if isinstance(module, FactoredLinear):
            whole = owners.get(module, name)
            owners.update((module.get_submodule(part), whole) for part in PARTS)
            role, form, rows = described
            yield Unit(name, role, module, form, 0, rows, None, owners.get(module))
            continue
        same_unit = {module, *inside}
        shared = [
            names[user]
            for parameter in module.parameters()
            for user in users[id(parameter)]
            if user not in same_unit
        ]
        role, form, rows = described
        size = stored_bytes(module, counted)
        counted |= {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        yield Unit(
            name, role, module, form, size, rows, next(iter(shared), None), owners.get(module)
        )


def _describe(name: str, module: nn.Module) -> tuple[Role, str, int] | None:
    match module:
        case Bag(table=nn.Embedding() as table):
            return "table", _float(table.weight), table.num_embeddings
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
        case nn.Embedding() | nn.EmbeddingBag():
            if module.max_norm is not None:
                raise StepRefused("table_renormalizes", table=name)
            return "table", _float(module.weight), module.num_embeddings
        case nn.Linear():
            return "dense", _float(module.weight), module.out_features
    return None


def _float(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def own_weight(module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """Set a new parameter on a module of a private copy; the shared parameter is not modified."""
    parameter = nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
    setattr(module, name, parameter)
    return parameter
