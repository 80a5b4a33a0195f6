"""2:4 sparsity: two zeros in every four inputs of a dense layer, and refitted other weights.

GPUs from compute capability 8.0 on multiply such weights with sparse kernels, which compute half
of the products. TensorRT's builder measures these kernels and uses them where they are faster,
which is often not the case for the layers of a recommender. The engine's audit reports which it
uses. ONNX Runtime stores and multiplies zeros like other weights, so it gains neither bytes nor
time.

Of every four weights the two least important become zero: the smallest weights, or the smallest
products of weight and input norm on the calibration rows (Wanda; on Frappe's networks no better,
``benchmarks/dense_formats.py``). Then the kept weights are refitted so that the layer's outputs on
those rows change least: least squares over the kept weights of each output channel.

Papers: Mishra et al. 2021, https://arxiv.org/abs/2104.08378 (2:4); Sun et al. 2023,
https://arxiv.org/abs/2306.11695 (weight times norm of its input); Frantar and Alistarh 2023,
https://arxiv.org/abs/2301.00774 (reconstruction, SparseGPT). Differs: the mask is chosen first, and
the reconstruction is the least squares solution for that mask, by conjugate gradients on all
channels at once, where SparseGPT processes the columns one by one and does not revisit them.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part, Plan
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.steps.decisions import Applied, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, own_weight
from compressors.errors.steps import RowsMissing
from compressors.quantize.calibration.input_moments import grams, squared_error

KIND = "sparse_2_4"
STORES_ZEROS = frozenset({"static_int8", "float16", "bfloat16"})
"""Formats of dense layers in which a zero is a zero, to a kernel as well."""
DAMPING = 0.01
"""Share of the mean energy of inputs by which moving a weight is held back: SparseGPT's."""
ROUNDS = 100
"""Of conjugate gradients, at most."""
ENOUGH = 1e-6
"""What may be left of the gradient."""


def kept_2_4(weight: Tensor, norms: Tensor | None = None) -> Tensor:
    """Which two of every four neighbouring inputs an output keeps: bool ``(out, in)``.

    Args:
        weight: float, ``(out, in)``, ``in`` a multiple of four.
        norms: of the inputs, float ``(in,)``; without them only the weights count. Of equally
            important weights the first are kept.
    """
    importance = weight.abs() if norms is None else weight.abs() * norms
    fours = importance.reshape(-1, 4)
    order = fours.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros(fours.shape, dtype=torch.bool).scatter_(1, order[:, :2], True)
    return kept.reshape(weight.shape)


def reconstructed(weight: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """Refit the kept weights so that the layer's outputs change least; the others are zero.

    Args:
        weight: float, ``(out, in)``.
        kept: bool, ``(out, in)``.
        gram: of the layer's inputs, float64 ``(in, in)``.

    Returns:
        ``(out, in)`` in the type of ``weight``. No output's squared error on the rows of the gram
        matrix is larger than with the other weights as they were: each round of conjugate
        gradients lowers that error and what damping adds to it, and damping only grows.
    """
    energy = gram.diagonal()
    curved = gram + torch.diag(torch.full_like(energy, DAMPING * float(energy.mean())))
    usual = 1 / curved.diagonal()
    wide = weight.double()
    moved = torch.where(kept, 0.0, -wide)  # change of each weight; removed weights: -w
    slope = torch.where(kept, moved @ curved, 0.0)  # half the gradient, (out, in)
    first = (slope * slope * usual).sum(dim=1, keepdim=True)
    along = -slope * usual
    size = first
    for _ in range(ROUNDS):
        going = size > ENOUGH**2 * first  # (out, 1): channels that have not converged
        if not bool(going.any()):
            break
        bent = torch.where(kept, along @ curved, 0.0)
        step = torch.where(going, size / (along * bent).sum(dim=1, keepdim=True), 0.0)
        moved = moved + step * along
        slope = slope + step * bent
        now = (slope * slope * usual).sum(dim=1, keepdim=True)
        along = -slope * usual + torch.where(going, now / size, 0.0) * along
        size = torch.where(going, now, size)
    return torch.where(kept, wide + moved, 0.0).to(weight.dtype)


def is_2_4(weight: Tensor) -> bool:
    """Whether at most two of every four neighbouring inputs have a weight: any type, 2-D."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(dim=1) <= 2).all())


def sparse_layers(module: nn.Module, plan: Plan | None) -> tuple[str, ...]:
    """Layers that this step made sparse and that are still sparse in their present format."""
    modules, sparse = dict(module.named_modules()), []
    for line in plan.lines if plan is not None else ():
        if KIND not in line.steps:
            continue
        layer = modules.get(line.module)
        weight = None
        if isinstance(layer, nn.Linear):
            weight = layer.weight
        elif isinstance(layer, PackedLinear) and layer.storage.name in STORES_ZEROS:
            buffers = dict(layer.named_buffers())
            weight = buffers.get("codes", buffers.get("weight"))
        if weight is not None and is_2_4(weight):
            sparse.append(line.module)
    return tuple(sparse)


class Sparse24(StepSettings):
    """Set two of every four weights of dense layers to zero, for TensorRT's sparse kernels."""

    effect: ClassVar[Effect] = "values"
    keeps_zeros: ClassVar[bool] = True

    kind: Literal["sparse_2_4"] = "sparse_2_4"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to prune: module names, with * for any characters."
    )
    importance: Literal["magnitude", "activation"] = Field(
        "magnitude",
        description="Which two of four stay: the largest weights, or the largest once weighed by "
        "the norm of their input on calibration rows.",
    )
    reconstruct: bool = Field(
        True, description="Fit the weights that stay to the layer's outputs on calibration rows."
    )
    rows: int = Field(4096, ge=1, description="Calibration rows read, at most.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows for the statistics of the inputs, unless only the weights count."""
        looks = self.reconstruct or self.importance == "activation"
        return ("calibration",) if looks else ()

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the dense layers to compress; give a reason for each other layer."""
        units = {unit.name: unit for unit in Unit.of(model.module)}
        chosen = choose_dense(tuple(units.values()), self.layers, self.kind)
        for name, decision in chosen.items():
            inputs = units[name].weight.shape[1] if decision.selected else 4
            if inputs % 4:
                chosen[name] = Decision("skipped", (Reason("inputs_not_multiple", inputs=inputs),))
            elif decision.selected:
                chosen[name] = Decision("taken", (Reason("two_of_four", step=self.kind),))
        return StepPlan(chosen, None)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> Applied:
        """Set two of every four weights of the selected layers to zero and refit the others.

        Raises:
            CompressionError: there are no calibration rows, or a layer never ran on them.
        """
        taken = plan.units(model.module)
        seen = self._seen(model, taken, bench) if self.needs else {}
        outcomes: dict[str, Decision] = {}
        for unit in taken:
            layer, weight, gram = unit.module, unit.weight, seen.get(unit.name)
            norms = None
            if gram is not None and self.importance == "activation":
                norms = gram.diagonal().sqrt().float()
            kept = kept_2_4(weight, norms)
            new_weight = torch.where(kept, weight, 0.0)
            if gram is not None and self.reconstruct:
                gone = float(squared_error(new_weight - weight, gram).sum())
                new_weight = reconstructed(weight, kept, gram)
                left = float(squared_error(new_weight - weight, gram).sum())
                if gone > 0:
                    error = Reason("reconstruction_error", share=left / gone)
                    outcomes[unit.name] = Decision("taken", (error,))
            if isinstance(layer, nn.Linear):
                own_weight(layer, "weight", new_weight)
        return Applied(model, outcomes)

    def _seen(self, model: Model, taken: list[Unit], bench: Bench) -> dict[str, Tensor]:
        if bench.calibration is None:
            raise RowsMissing("activations_need_rows", step=self.kind)
        rows, signature = bench.calibration, bench.signature
        return grams(model.module, taken, rows, signature, self.batch, self.rows)
