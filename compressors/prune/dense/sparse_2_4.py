"""2:4 sparsity: set two of every four weights of a dense layer to zero and refit the others.

GPUs with compute capability 8.0 or higher multiply such weights with sparse kernels, which compute
half of the products. TensorRT's builder measures these kernels and uses them where they are faster,
which is often not the case for the layers of a recommender. The audit of the built engine reports
whether it uses them. ONNX Runtime stores and multiplies zeros like other weights, so it gains
neither bytes nor time.

Of every four weights the two least important become zero: the smallest weights, or the smallest
products of weight and input norm on the calibration rows (Wanda; not better on the data set
Frappe, see ``benchmarks/dense_formats.py``). Then the kept weights are refitted so that the layer's
outputs on those rows change least: a least-squares problem in the kept weights of each output
channel.

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
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, replace_parameter
from compressors.errors.steps import RowsMissing
from compressors.quantize.calibration.input_moments import gram_matrices, squared_error

KIND = "sparse_2_4"
STORES_ZEROS = frozenset({"static_int8", "float16", "bfloat16"})
"""Formats of dense layers that store a zero weight as zero, so that sparse kernels can skip it."""
DAMPING = 0.01
"""Penalty on changing a weight, as a share of the inputs' mean sum of squares, as in SparseGPT."""
MAX_ITERATIONS = 100
"""Largest number of conjugate gradient iterations."""
TOLERANCE = 1e-6
"""Conjugate gradients stop if the norm of the gradient falls to this share of its initial value."""


def kept_2_4(weight: Tensor, norms: Tensor | None = None) -> Tensor:
    """Select the two weights of every four consecutive inputs that each output keeps.

    Args:
        weight: float, ``(out, in)``, ``in`` a multiple of four.
        norms: norms of the inputs, float ``(in,)``; if None, only the weights count.

    Returns:
        Bool ``(out, in)``. Of equally important weights the first ones are kept.
    """
    importance = weight.abs() if norms is None else weight.abs() * norms
    blocks = importance.reshape(-1, 4)
    permutation = blocks.argsort(dim=1, descending=True, stable=True)
    is_kept = torch.zeros(blocks.shape, dtype=torch.bool).scatter_(1, permutation[:, :2], True)
    return is_kept.reshape(weight.shape)


def refit_kept_weights(weight: Tensor, is_kept: Tensor, gram: Tensor) -> Tensor:
    """Refit the kept weights so that the layer's outputs change least; the others are zero.

    Args:
        weight: float, ``(out, in)``.
        is_kept: bool, ``(out, in)``.
        gram: ``x.T @ x`` of the layer's inputs, float64 ``(in, in)``.

    Returns:
        ``(out, in)`` in the dtype of ``weight``. No output's squared error on the rows of the gram
        matrix is larger than with the kept weights unchanged: each iteration of conjugate gradients
        decreases that error plus the damping term, and the damping term is smallest at the start.
    """
    energy = gram.diagonal()
    damped = gram + torch.diag(torch.full_like(energy, DAMPING * float(energy.mean())))
    preconditioner = 1 / damped.diagonal()  # Jacobi
    exact = weight.double()
    change = torch.where(is_kept, 0.0, -exact)  # of each weight; a removed weight changes by -w
    gradient = torch.where(is_kept, change @ damped, 0.0)  # half the gradient, (out, in)
    initial = (gradient * gradient * preconditioner).sum(dim=1, keepdim=True)
    direction = -gradient * preconditioner
    squared_norm = initial
    for _ in range(MAX_ITERATIONS):
        active = squared_norm > TOLERANCE**2 * initial  # (out, 1): outputs not yet converged
        if not bool(active.any()):
            break
        damped_direction = torch.where(is_kept, direction @ damped, 0.0)
        curvature = (direction * damped_direction).sum(dim=1, keepdim=True)
        step_size = torch.where(active, squared_norm / curvature, 0.0)
        change = change + step_size * direction
        gradient = gradient + step_size * damped_direction
        new_norm = (gradient * gradient * preconditioner).sum(dim=1, keepdim=True)
        ratio = torch.where(active, new_norm / squared_norm, 0.0)
        direction = -gradient * preconditioner + ratio * direction
        squared_norm = torch.where(active, new_norm, squared_norm)
    return torch.where(is_kept, exact + change, 0.0).to(weight.dtype)


def is_2_4(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive weights of each output are not zero.

    ``weight`` may have any dtype; the result is False unless it is two-dimensional with a multiple
    of four inputs.
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(dim=1) <= 2).all())


def sparse_layers(module: nn.Module, plan: Plan | None) -> tuple[str, ...]:
    """Return the layers that this step made sparse and that are still sparse as stored now.

    Args:
        module: the network.
        plan: its plan, which lists the steps of each layer.
    """
    modules, sparse = dict(module.named_modules()), []
    for line in plan.lines if plan is not None else ():
        if KIND not in line.steps:
            continue
        layer = modules.get(line.module)
        weight = None
        if isinstance(layer, nn.Linear):
            weight = layer.weight
        elif isinstance(layer, PackedLinear) and layer.storage.name in STORES_ZEROS:
            buffers = dict(layer.named_buffers())  # "codes" of int8, or "weight" of 16 bits
            weight = buffers.get("codes", buffers.get("weight"))
        if weight is not None and is_2_4(weight):
            sparse.append(line.module)
    return tuple(sparse)


class Sparse24(StepSettings):
    """Set two of every four weights of dense layers to zero, for TensorRT's sparse kernels."""

    effect: ClassVar[Effect] = "values"  # units keep their format; their weights change
    keeps_zeros: ClassVar[bool] = True  # later training leaves these weights at zero

    kind: Literal["sparse_2_4"] = "sparse_2_4"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to prune: module names, with * for any characters."
    )
    importance: Literal["magnitude", "activation"] = Field(
        "magnitude",
        description="Which two of four weights stay. magnitude: the largest. activation: the "
        "largest after multiplication by the norm of their input on calibration rows.",
    )
    reconstruct: bool = Field(
        True,
        description="Refit the kept weights so that the layer's outputs on calibration rows "
        "change least.",
    )
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows to read.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows for the statistics of the inputs, if they are used."""
        uses_inputs = self.reconstruct or self.importance == "activation"
        return ("calibration",) if uses_inputs else ()

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the dense layers to compress; give a reason for each other layer."""
        units = {unit.name: unit for unit in Unit.of(model.module)}
        decisions = choose_dense(tuple(units.values()), self.layers, self.kind)
        for name, decision in decisions.items():
            if not decision.selected:
                continue
            inputs = units[name].weight.shape[1]
            if inputs % 4:
                why = Reason("inputs_not_multiple", inputs=inputs)
                decisions[name] = Decision("skipped", (why,))
            else:
                decisions[name] = Decision("taken", (Reason("two_of_four", step=self.kind),))
        return StepPlan(decisions, payload=None)  # ``apply`` needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Set two of every four weights of the selected layers to zero and refit the others.

        Raises:
            RowsMissing: there are no calibration rows.
            StepRefused: a layer never ran on the calibration rows, or received only zeros.
        """
        units = plan.units(model.module)
        input_grams = self._compute_input_grams(model, units, bench) if self.needs else {}
        outcomes: dict[str, Decision] = {}
        for unit in units:
            layer, weight, gram = unit.module, unit.weight, input_grams.get(unit.name)
            norms = None
            if gram is not None and self.importance == "activation":
                norms = gram.diagonal().sqrt().float()
            is_kept = kept_2_4(weight, norms)
            new_weight = torch.where(is_kept, weight, 0.0)
            if gram is not None and self.reconstruct:
                error_before = float(squared_error(new_weight - weight, gram).sum())
                new_weight = refit_kept_weights(weight, is_kept, gram)
                error_after = float(squared_error(new_weight - weight, gram).sum())
                if error_before > 0:
                    error = Reason("reconstruction_error", share=error_after / error_before)
                    outcomes[unit.name] = Decision("taken", (error,))
            if isinstance(layer, nn.Linear):
                replace_parameter(layer, "weight", new_weight)
        return AppliedStep(model, outcomes)

    def _compute_input_grams(
        self, model: Model, units: list[Unit], bench: Bench
    ) -> dict[str, Tensor]:
        """Compute the gram matrix of each layer's inputs on calibration rows: float64 ``(in, in)``.

        Raises:
            RowsMissing: there are no calibration rows.
        """
        if bench.calibration is None:
            raise RowsMissing("activations_need_rows", step=self.kind)
        rows, signature = bench.calibration, bench.signature
        return gram_matrices(model.module, units, rows, signature, self.batch, self.rows)
