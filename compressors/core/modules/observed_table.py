"""A table that reports how a network's forward code reads its weight."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from compressors.core.modules.table_weight import TableWeight, can_multiply

Read = Literal["looked_up", "multiplied", "decoded"]
"""How code reads a weight: some rows of it, a matmul with all rows, or the whole matrix."""

Observe = Callable[[Read, Tensor | None], None]
"""A function of the kind of a read, and of its ids ``(*,)`` or multiplied vectors ``(*, dim)``.

It is called for each read. The second argument is None if the whole matrix is read.
"""


class ObservedTable(nn.Module):
    """Calls a table and reports reads of its weight; its scores are those of the table.

    Args:
        table: the table, plain or compressed, or a bag; it is no submodule of this module.
        observe: called for each read of the weight; calls of the table are not reported.
        hides_attributes: whether reading an attribute of the table other than its weight raises
            ``AttributeError``, as for a compressed table.
    """

    def __init__(self, table: nn.Module, observe: Observe, *, hides_attributes: bool) -> None:
        super().__init__()
        # In the instance's dict, so that the table is no submodule and keeps its name in the
        # network.
        vars(self).update(observed=table, observe=observe, hides_attributes=hides_attributes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["observed"](*args, **kwargs)

    @property
    def weight(self) -> "_ObservedWeight":
        """The weight, whose reads are reported."""
        rows, dim = vars(self)["observed"].weight.shape
        return _ObservedWeight(self, rows, dim)

    def can_multiply(self) -> bool:
        """Return whether the table multiplies without decoding all rows at once."""
        return can_multiply(vars(self)["observed"])

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply float32 ``(*, dim)`` by every row, and report it."""
        return self.weight.multiply(x)

    def __getattr__(self, name: str) -> Any:
        if vars(self)["hides_attributes"]:
            return super().__getattr__(name)
        return getattr(vars(self)["observed"], name)


class _ObservedWeight(TableWeight):
    """The weight of an observed table."""

    @property
    def _actual(self) -> Any:
        return self.table.observed.weight

    def look_up(self, ids: Tensor) -> Tensor:
        self.table.observe("looked_up", ids)
        return F.embedding(ids, self._actual)

    def multiply(self, x: Tensor) -> Tensor:
        self.table.observe("multiplied", x)
        return F.linear(x, self._actual)

    def decode(self) -> Tensor:
        self.table.observe("decoded", None)
        weight = self._actual
        matrix: Tensor = weight.decode() if isinstance(weight, TableWeight) else weight
        return matrix.T if self.transposed else matrix

    @property
    def device(self) -> Any:
        return self._actual.device
