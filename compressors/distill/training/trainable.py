"""Select the tensors that training may change, and replace them by copies.

Compressed modules are ``PackedTable``, ``PackedLinear``, ``ComposedTable`` (a table built from
smaller ones) and ``Bag`` (which replaces an EmbeddingBag).
"""

import torch
from torch import Tensor, nn

from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.formats import Bag, PackedLinear, PackedTable
from compressors.core.state.construction import tensor_named
from compressors.core.units import replace_parameter


def trainable_tensors(module: nn.Module, *, tables: bool, dense: bool = True) -> tuple[str, ...]:
    """Return the names of the tensors that training may change.

    These are float32 parameters, and in compressed modules the float32 tensors that the format
    declares as learned, such as scales and codebooks. ``tables`` selects those of tables, ``dense``
    all others. If tables are not trained, a dense weight that is shared with one is not either.
    """
    names = []
    in_tables: set[nn.Module] = set()
    frozen: set[int] = set()  # a layer's weight that is shared with a table is frozen with it
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag | ComposedTable | PackedTable | Bag):
            in_tables |= set(part.modules())
            frozen |= {id(parameter) for parameter in part.parameters() if not tables}
    for owner, part in module.named_modules():
        prefix = f"{owner}." if owner else ""
        learned = _list_learned_names(part)
        for name, tensor in (
            *part.named_parameters(recurse=False),
            *part.named_buffers(recurse=False),
        ):
            can_train = isinstance(tensor, nn.Parameter) or name in learned
            is_selected = tables if part in in_tables else dense
            is_float32 = tensor.dtype == torch.float32
            if can_train and is_selected and is_float32 and id(tensor) not in frozen:
                names.append(prefix + name)
    return tuple(names)


def _list_learned_names(part: nn.Module) -> tuple[str, ...]:
    """Return the names of the buffers that a compressed module's format declares as learned."""
    match part:
        case PackedLinear() | PackedTable():
            return part.storage.learned
        case ComposedTable():
            return part.composition.learned
    return ()


def replace_trained_tensors(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Replace the named tensors of a module by trainable copies; tied tensors stay tied.

    All other parameters are frozen.

    Returns:
        The copies, by name; of tied tensors, only the first name.
    """
    copies: dict[int, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        part = module.get_submodule(owner)
        old = tensor_named(module, name)
        if id(old) in copies:
            setattr(part, attribute, copies[id(old)])
            continue
        if isinstance(old, nn.Parameter):
            new: Tensor = replace_parameter(part, attribute, old.detach().clone())
        else:
            new = old.detach().clone().requires_grad_(True)
            setattr(part, attribute, new)
        copies[id(old)] = leaves[name] = new
    # Frozen parameters are new objects, because the old ones may be shared with another network.
    frozen: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not any(parameter is leaf for leaf in leaves.values()):
                untrained = nn.Parameter(parameter.detach(), requires_grad=False)
                setattr(part, name, frozen.setdefault(id(parameter), untrained))
    return leaves


def replace_buffers(module: nn.Module) -> tuple[str, ...]:
    """Replace buffers that training may change, such as those of norms, by copies.

    Buffers of packed modules are not replaced here: training changes only the ones that
    ``trainable_tensors`` names.

    Returns:
        The names of the replaced buffers.
    """
    names = []
    packed: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, PackedLinear | ComposedTable | PackedTable | Bag):
            packed |= set(part.modules())
    for owner, part in module.named_modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if part not in packed:
                setattr(part, name, buffer.detach().clone())
                names.append(f"{owner}.{name}" if owner else name)
    return tuple(names)


def is_table(module: nn.Module, name: str) -> bool:
    """Whether a tensor is the weight of an uncompressed table."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag)


def find_packed_owner(module: nn.Module, name: str) -> PackedTable | None:
    """Return the packed table that a tensor belongs to, or None."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return owner if isinstance(owner, PackedTable) else None
