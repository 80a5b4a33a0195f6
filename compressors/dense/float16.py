"""Tables and dense layers as float16: half the bytes, no calibration.

Tables are looked up in float16 and widened after the lookup. Dense layers compute in float16
where the target does (TensorRT); ONNX Runtime on CPU has no float16 Gemm, so there only the
stored bytes halve and the arithmetic stays float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Bench, Change, Frozen, Part
from compressors.errors import CompressionError
from compressors.formats import LinearFormat, PackedLinear, PackedTable, TableFormat, TensorSpec
from compressors.model import Model
from compressors.stand_ins import packed_outline
from compressors.units import Choice, Unit, choose_dense, choose_tables, pack_table, swap


def narrow(name: str, weight: Tensor) -> Tensor:
    """A tensor as float16, refusing numbers beyond its range.

    Raises:
        CompressionError: a weight is above 65,504.
    """
    half = weight.detach().to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise CompressionError(
            f"{name!r} holds {float(weight.abs().max()):g}, beyond float16's 65504. Leave it out "
            f"of 'tables' or 'layers'."
        )
    return half


@torch.library.custom_op("recpress::float16_table", mutates_args=())
def float16_table(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows of a float16 ``(rows, dim)`` table as float32 ``(*ids, dim)``."""
    return weight[ids].float()


@float16_table.register_fake
def _(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]), dtype=torch.float32)


def _keep_table(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _table_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    weight, ids = ctx.saved_tensors
    total = torch.zeros(weight.shape, device=weight.device)
    total.index_add_(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1]))
    return total.to(weight.dtype), None


float16_table.register_autograd(_table_backward, setup_context=_keep_table)


@torch.library.custom_op("recpress::float16_linear", mutates_args=())
def float16_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """float32 ``(*, in)``, float16 ``(out, in)`` and ``(out,)`` -> float32 ``(*, out)``."""
    return F.linear(x, weight.float(), bias.float())


@float16_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep_linear(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = ctx.saved_tensors
    flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return grad @ weight.float(), (flat.T @ rows).to(weight.dtype), flat.sum(0).to(bias.dtype)


float16_linear.register_autograd(_linear_backward, setup_context=_keep_linear)


@dataclass(frozen=True)
class Float16TableFormat:
    """``weight`` float16 ``(rows, dim)``."""

    name: str = "float16"
    learned: tuple[str, ...] = ()  # too coarse to be trained in: Adam's small steps would vanish

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:  # noqa: ARG002
        return {"weight": TensorSpec((rows, dim), torch.float16)}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        ids: Tensor,
        dim: int,  # noqa: ARG002
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        rows: Tensor = torch.ops.recpress.float16_table(stored["weight"], ids)
        return rows


@dataclass(frozen=True)
class Float16LinearFormat:
    """``weight`` float16 ``(out, in)`` and ``bias`` ``(out,)`` (zeros where there is none)."""

    name: str = "float16"
    learned: tuple[str, ...] = ()  # as the table's

    def layout(
        self,
        inputs: int,
        outputs: int,
        settings: Mapping[str, Any],  # noqa: ARG002
        *,
        bias: bool,  # noqa: ARG002
    ) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec((outputs, inputs), torch.float16),
            "bias": TensorSpec((outputs,), torch.float16),
        }

    def apply(
        self,
        stored: Mapping[str, Tensor],
        x: Tensor,
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        y: Tensor = torch.ops.recpress.float16_linear(x, stored["weight"], stored["bias"])
        return y


TABLE_FORMAT: TableFormat = Float16TableFormat()
LINEAR_FORMAT: LinearFormat = Float16LinearFormat()


class Float16(Frozen):
    """Store tables and dense layers as float16."""

    kind: Literal["float16"] = "float16"
    tables: tuple[str, ...] = Field(("*",), description="Tables to compress, with * as wildcard.")
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to compress, with * as wildcard."
    )
    min_rows: int = Field(1, ge=1, description="Tables with fewer rows stay as they are.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """No data: narrowing is the same whatever the rows are."""
        return ()

    @property
    def changes(self) -> Change:
        """Each unit it takes is stored in another format."""
        return "format"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:  # noqa: ARG002
        """Which tables and dense layers this step takes, and why not the others."""
        units = Unit.of(model.module)
        return {
            **choose_tables(units, self.tables, self.min_rows, self.kind),
            **choose_dense(units, self.layers, self.kind),
        }

    def apply(self, model: Model, bench: Bench) -> Model:
        """Replace every chosen table and layer."""
        module, choices = model.module, self.choose(model, bench)
        for unit in Unit.of(module):
            if not choices[unit.name].take:
                continue
            weight = narrow(f"{unit.name}.weight", unit.weight)
            if unit.role == "table":
                rows, dim = weight.shape
                packed = PackedTable(TABLE_FORMAT, rows, dim, {}, {"weight": weight})
                swap(module, unit.name, pack_table(unit.module, packed))
                continue
            bias = unit.bias
            stored = {
                "weight": weight,
                "bias": weight.new_zeros(weight.shape[0])
                if bias is None
                else narrow(f"{unit.name}.bias", bias),
            }
            outputs, inputs = weight.shape
            swap(
                module,
                unit.name,
                PackedLinear(LINEAR_FORMAT, inputs, outputs, bias=bias is not None, stored=stored),
            )
        return model

    def outline(self, model: Model, bench: Bench) -> Model:
        """Every chosen table and layer in the format."""
        choices = self.choose(model, bench)
        return packed_outline(model, choices, table=TABLE_FORMAT, linear=LINEAR_FORMAT)
