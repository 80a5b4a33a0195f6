"""The weight of a compressed table, for networks that read ``table.weight`` instead of calling it.

Such networks slice a table's weight (``positions.weight[:length]``) or multiply by it, as an output
head that scores all items (``hidden @ items.weight.T``) does. A ``TableWeight`` takes the place of
the weight. Slices and ids decode only these rows. A matmul multiplies by the stored codes (the
integers from which rows are decoded), block by block. Every other use decodes the whole table.

``TiedHead`` is the same matmul for a dense layer whose weight is the weight of a table.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from compressors.contracts import ModuleRecord

TIED = "tied"
"""Format, in plans and bundles, of a dense layer whose weight is the weight of a table."""


@runtime_checkable
class Multiplicable(Protocol):
    """A table that multiplies by its codes without decoding all of its rows at once."""

    def can_multiply(self) -> bool:
        """Return whether its format and settings allow that."""

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply float32 ``(*, dim)`` by every row: float32 ``(*, rows)``."""


def can_multiply(table: nn.Module) -> bool:
    """Return whether a table, plain or compressed, multiplies without decoding all rows at once."""
    if isinstance(table, nn.Embedding | nn.EmbeddingBag):
        return True  # its weight is a matrix of floats
    return isinstance(table, Multiplicable) and table.can_multiply()


class TableWeight:
    """The weight ``(rows, dim)`` of a compressed table, or its transpose ``(dim, rows)``.

    It is no tensor, but torch's functions and operators accept it (``__torch_function__``), also
    while ``torch.export`` traces the network.

    Args:
        table: the table's module, which maps ids ``(*,)`` to float32 rows ``(*, dim)``.
        rows: number of rows.
        dim: width of the table.
        transposed: whether this is the transpose.
    """

    dtype = torch.float32
    is_sparse = requires_grad = False
    grad = None

    def __init__(self, table: nn.Module, rows: int, dim: int, *, transposed: bool = False) -> None:
        self.table: Any = table
        self.rows, self.columns, self.transposed = rows, dim, transposed

    def look_up(self, ids: Tensor) -> Tensor:
        """Decode some rows: ids ``(*,)`` to float32 ``(*, dim)``."""
        rows: Tensor = self.table(ids)
        return rows

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply float32 ``(*, dim)`` by every row: float32 ``(*, rows)``."""
        if isinstance(self.table, Multiplicable) and self.table.can_multiply():
            return self.table.multiply(x)
        return F.linear(x, self.look_up(self._list_all_ids()))

    def decode(self) -> Tensor:
        """Decode all rows: float32, in the shape of this object."""
        decoded = self.look_up(self._list_all_ids())
        return decoded.T if self.transposed else decoded

    def _list_all_ids(self) -> Tensor:
        return torch.arange(self.rows, device=self.device)

    def _transpose(self) -> "TableWeight":
        return type(self)(self.table, self.rows, self.columns, transposed=not self.transposed)

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrix."""
        sides = (self.rows, self.columns)
        return torch.Size(sides[::-1] if self.transposed else sides)

    @property
    def device(self) -> Any:
        """The device of the table's tensors."""
        tensors = (*self.table.buffers(), *self.table.parameters())
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return 2

    @property
    def T(self) -> "TableWeight":  # noqa: N802 - torch's name
        """The transpose."""
        return self._transpose()

    mT = T  # noqa: N815 - torch's name

    @property
    def data(self) -> "TableWeight":
        """The weight itself, which has no gradient."""
        return self

    def t(self) -> "TableWeight":
        """Return the transpose."""
        return self._transpose()

    def detach(self) -> "TableWeight":
        """Return the weight itself, which has no gradient."""
        return self

    def dim(self) -> int:
        """Return the number of dimensions."""
        return 2

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one side of it."""
        return self.shape if dim is None else self.shape[dim]

    def transpose(self, first: int, second: int) -> "TableWeight":
        """Return the matrix with two dimensions exchanged."""
        return self if first % 2 == second % 2 else self._transpose()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        """Decode the rows that an index selects; indices of columns are applied afterwards."""
        first, *others = index if isinstance(index, tuple) and index else (index,)
        ids = None if self.transposed else self._select_ids(first)
        if ids is None or (others and not isinstance(first, slice)):
            return self.decode()[index]
        rows = self.look_up(ids)
        return rows[(slice(None), *others)] if others else rows

    def _select_ids(self, index: Any) -> Tensor | None:
        """Return the ids that an index of rows selects; None for other kinds of indices."""
        match index:
            case slice(step=None | 1):
                begin = 0 if index.start is None else self._find_position(index.start)
                end = self.rows if index.stop is None else self._find_position(index.stop)
                if type(begin) is type(end) is int:
                    end = max(begin, end)
                return torch.arange(begin, end, device=self.device)
            case Tensor() if not index.is_floating_point() and index.dtype != torch.bool:
                return torch.where(index < 0, index + self.rows, index)
            case int() if not isinstance(index, bool) and -self.rows <= index < self.rows:
                return torch.tensor(index % self.rows, device=self.device)
        return None

    def _find_position(self, side: Any) -> Any:
        """Return one side of a slice, counted from the first row; a symbolic length is unchanged.

        While a network is exported, a length may be symbolic: it has no value yet.
        """
        if type(side) is not int:
            return side
        return min(max(side + self.rows if side < 0 else side, 0), self.rows)

    def __matmul__(self, other: Tensor) -> Tensor:
        return _matmul(self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return _matmul(other, self)

    def __getattr__(self, name: str) -> Any:
        """Return a method or attribute of the decoded matrix."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.decode(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch with this object in place of a matrix."""
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        args, kwargs = tree_map(_decode_if_weight, (args, kwargs or {}))
        return func(*args, **kwargs)


def _decode_if_weight(value: Any) -> Any:
    return value.decode() if isinstance(value, TableWeight) else value


def _matmul(x: Any, other: Any) -> Tensor:
    """Return ``x @ other``; a matmul with the transposed weight decodes no whole table."""
    if isinstance(other, TableWeight) and other.transposed and isinstance(x, Tensor):
        return other.multiply(x)
    if isinstance(x, TableWeight) and not x.transposed and isinstance(other, Tensor):
        transposed = x.multiply(other.transpose(-2, -1) if other.dim() > 1 else other)
        return transposed.transpose(-2, -1) if other.dim() > 1 else transposed
    return torch.matmul(_decode_if_weight(x), _decode_if_weight(other))


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:  # noqa: A002 - torch's names
    """Return ``F.linear`` with the weight of a table."""
    if not isinstance(weight, TableWeight) or weight.transposed or not isinstance(input, Tensor):
        return F.linear(
            _decode_if_weight(input), _decode_if_weight(weight), _decode_if_weight(bias)
        )
    output = weight.multiply(input)
    return output if bias is None else output + bias


def _embedding(
    input: Tensor,  # noqa: A002 - torch's names
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *settings: Any,
    **named: Any,
) -> Tensor:
    """Return ``F.embedding`` of the weight of a table.

    ``padding_idx`` and the last settings concern gradients only. With ``max_norm``, the looked-up
    rows are renormalized as torch does, but the stored table is not changed.
    """
    del padding_idx, settings, named
    decodes = not isinstance(weight, TableWeight) or weight.transposed
    rows = F.embedding(input, _decode_if_weight(weight)) if decodes else weight.look_up(input)
    if max_norm is None:
        return rows
    norms = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    return torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows)


def _index_select(weight: Any, dim: int, index: Tensor) -> Tensor:
    """Return ``torch.index_select`` of the weight of a table."""
    rows = isinstance(weight, TableWeight) and not weight.transposed and dim in (0, -2)
    return (
        weight.look_up(index) if rows else torch.index_select(_decode_if_weight(weight), dim, index)
    )


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.index_select: _index_select,
    Tensor.index_select: _index_select,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul
    ),
    Tensor.__rmatmul__: lambda weight, x: _matmul(x, weight),
}
"""Functions of torch that need not decode a whole table."""


def _define_operators() -> None:
    """Define Python's operators: they decode the table, and compute with the matrix."""

    def operator(name: str) -> Callable[..., Any]:
        return lambda self, *others: getattr(self.decode(), name)(*map(_decode_if_weight, others))

    for name in ("add", "sub", "mul", "truediv", "pow"):
        for method in (f"__{name}__", f"__r{name}__"):
            setattr(TableWeight, method, operator(method))
    for method in ("__neg__", "__abs__"):
        setattr(TableWeight, method, operator(method))


_define_operators()


class TiedHead(nn.Module):
    """Replacement of an ``nn.Linear`` with the weight of a table: ``(*, dim)`` to ``(*, rows)``.

    The weight is that of the table whenever the head is called, so the head has only a bias.

    Args:
        table: the module of the table, which is a submodule of the network too.
        bias: float ``(rows,)`` or None.
        name: the name of the table in the network.
        shape: rows and width of the table.
    """

    def __init__(
        self, table: nn.Module, bias: nn.Parameter | None, name: str, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.table_name = name
        self.set_table(table)
        self.register_parameter("bias", bias)

    @property
    def table(self) -> nn.Module:
        """The module of the table."""
        table: nn.Module = self.__dict__["_table"]
        return table

    def set_table(self, table: nn.Module) -> None:
        """Set the module of the table; it is no submodule, so that it has one name only."""
        self.__dict__["_table"] = table

    @property
    def weight(self) -> Any:
        """The weight of the table."""
        return self.table.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return F.linear(input, self.table.weight, self.bias)  # type: ignore[arg-type]

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module."""
        return ModuleRecord(
            kind="linear",
            format=TIED,
            settings={
                "in_features": self.in_features,
                "out_features": self.out_features,
                "bias": self.bias is not None,
                "table": self.table_name,
            },
        )
