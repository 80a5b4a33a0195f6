"""Embedding tables as short codes that a small network decodes.

Row ``id`` is ``codes[id] @ projection + relu(codes[id] @ inner + bias) @ outer + mean``: a low-rank
approximation plus a nonlinear correction, for rows on a curved surface.

Source: Kang et al. 2021, https://arxiv.org/abs/2010.10784 (deep hash embeddings: a decoder makes
rows from dense codes); Hinton and Salakhutdinov 2006 (autoencoders against principal components).
Differs: codes are fitted to a trained table together with the decoder, starting from the truncated
singular value decomposition, so the error is never larger than that of low rank with as many
numbers per row. There codes are hashes that are not stored, and the decoder is larger than any
table. Here the decoder has one hidden layer, and the last layer is solved by least squares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import Composition, Design, Parts, PartSpec
from compressors.core.modules.formats import TensorSpec
from compressors.core.steps.composition_steps import (
    ComposingStep,
    Designs,
    FittedParts,
    choose_composed,
    recompose,
    row_weights,
    share_or_number,
)
from compressors.core.steps.decisions import Applied, StepPlan
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.factorize.low_rank import factors

BATCH = 4096
BLOCK = 65_536
CODE_RATE, DECODER_RATE = 0.01, 0.003  # Adam's learning rates, for codes and rows of unit size
MOST_SHARE = 0.25  # largest size of the hidden layer, as a share of the codes' numbers
DAMPING = 1e-9  # of the last layer's normal equations, relative to their mean diagonal


class Decoder(NamedTuple):
    """Decoder from a code to a row: two layers and a linear skip connection."""

    projection: Tensor  # (code, dim)
    inner: Tensor  # (code, hidden)
    bias: Tensor  # (hidden,)
    outer: Tensor  # (hidden, dim)
    mean: Tensor  # (dim,)


def decode(codes: Tensor, decoder: Decoder) -> Tensor:
    """Decode codes ``(*, code)`` to rows ``(*, dim)``."""
    bent = F.relu(torch.matmul(codes, decoder.inner) + decoder.bias)  # (*, hidden)
    straight = torch.matmul(codes, decoder.projection)
    return straight + torch.matmul(bent, decoder.outer) + decoder.mean


def squared_error(table: Tensor, weight: Tensor, codes: Tensor, decoder: Decoder) -> float:
    """The weighted squared error of all rows, summed in float64."""
    total = 0.0
    for begin in range(0, len(table), BLOCK):
        block = slice(begin, begin + BLOCK)
        gap = decode(codes[block], decoder) - table[block]
        total += float((weight[block] * gap.double().square().sum(dim=1)).sum())
    return total


def fit(
    table: Tensor, weight: Tensor, size: int, hidden: int, steps: int, seed: int
) -> tuple[Tensor, Decoder]:
    """Fit codes and a decoder to the rows of a table by squared error.

    The fit starts at the closest rows of rank ``size``, with a random hidden layer and an outer
    layer from least squares. It trains codes and decoder with Adam on batches of rows (the full
    table if it is short), and solves for the outer layer again. The result is the best state at
    these three points; the first of them is the low-rank approximation.

    Args:
        table: float, ``(rows, dim)``.
        weight: weight of each row's squared error, ``(rows,)``, all positive.
        size: numbers per code, at most ``dim``.
        hidden: width of the hidden layer.
        steps: number of Adam steps, which bounds the time; with 0 the hidden layer stays random.
        seed: seed of the hidden layer and of the order of rows.

    Returns:
        ``codes`` float32 ``(rows, size)`` and the decoder, float32.
    """
    exact, share = table.float(), weight.double() / weight.double().mean()
    narrow, projection, mean = factors(exact, size, share)
    unit = float(narrow.square().mean().sqrt()) or 1.0  # codes and rows train at unit size
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(size, hidden, generator=generator) / size**0.5
    bias = torch.randn(hidden, generator=generator)
    nothing = torch.zeros(hidden, table.shape[1])
    start = Decoder(projection, inner / unit, bias, nothing, mean)
    best = narrow, start
    least = squared_error(exact, share, *best)
    scaled = exact / unit
    codes = narrow / unit
    decoder = Decoder(projection, inner, bias, nothing, mean / unit)
    for train in (False, True):
        if train:
            codes, decoder = _trained(scaled, share, codes, decoder, steps, generator)
        decoder = _solved(scaled, share, codes, decoder)
        candidate = codes * unit, _in_units(decoder, unit)
        error = squared_error(exact, share, *candidate)
        if error < least:
            best, least = candidate, error
    return best


def _in_units(decoder: Decoder, unit: float) -> Decoder:
    """Rescale a decoder of codes and rows of unit size to the size of the table's rows."""
    return Decoder(
        decoder.projection,
        decoder.inner / unit,
        decoder.bias,
        decoder.outer * unit,
        decoder.mean * unit,
    )


def _solved(table: Tensor, weight: Tensor, codes: Tensor, decoder: Decoder) -> Decoder:
    """Set the last layer to the least-squares optimum for given codes and hidden layer."""
    size, hidden = decoder.inner.shape
    width = size + hidden + 1
    left = torch.zeros(width, width, dtype=torch.float64)
    right = torch.zeros(width, table.shape[1], dtype=torch.float64)
    for begin in range(0, len(table), BLOCK):
        block = slice(begin, begin + BLOCK)
        bent = F.relu(codes[block] @ decoder.inner + decoder.bias)
        ones = torch.ones(len(bent), 1)
        read = torch.cat([codes[block], bent, ones], dim=1).double()  # (block, width)
        weighed = read * weight[block].unsqueeze(1)
        left += weighed.T @ read
        right += weighed.T @ table[block].double()
    # A hidden unit that no row activates has a row of zeros: damping keeps the system solvable.
    damping = DAMPING * left.diagonal().mean()
    left.diagonal().add_(damping)
    last = torch.linalg.solve(left, right).float()
    return decoder._replace(projection=last[:size], outer=last[size:-1], mean=last[-1])


def _trained(
    table: Tensor,
    weight: Tensor,
    codes: Tensor,
    decoder: Decoder,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Decoder]:
    """Train codes and decoder with Adam and a learning rate that falls to zero as a cosine.

    A batch changes only the codes of its rows, so the cost of a step does not depend on the number
    of rows.
    """
    rows = len(table)
    code_table = torch.nn.Embedding(
        rows, codes.shape[1], sparse=rows > BATCH, _weight=codes.clone()
    )
    leaves = [tensor.clone().requires_grad_(True) for tensor in decoder]
    adam = torch.optim.SparseAdam if rows > BATCH else torch.optim.Adam
    optimizers: list[torch.optim.Optimizer] = [
        adam(code_table.parameters(), lr=CODE_RATE),
        torch.optim.Adam(leaves, lr=DECODER_RATE),
    ]
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=max(steps, 1)) for each in optimizers
    ]
    order, read = torch.empty(0, dtype=torch.int64), 0
    for _ in range(steps):
        if read + min(rows, BATCH) > len(order):
            order, read = torch.randperm(rows, generator=generator), 0
        ids = order[read : read + BATCH]
        read += len(ids)
        gap = decode(code_table(ids), Decoder(*leaves)) - table[ids]
        loss = (weight[ids].float() * gap.square().sum(dim=1)).mean()
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for each, schedule in zip(optimizers, schedules, strict=True):
            each.step()
            schedule.step()
    return code_table.weight.detach(), Decoder(*(leaf.detach() for leaf in leaves))


@dataclass(frozen=True)
class NeuralCodesComposition:
    """The decoder's five tensors in float32, and part ``codes`` ``(rows, code)``."""

    name: str = "neural_codes"
    learned: tuple[str, ...] = Decoder._fields

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        size, hidden = settings["codes"], settings["hidden"]
        shapes = ((size, dim), (size, hidden), (hidden,), (hidden, dim), (dim,))
        return {
            name: TensorSpec(shape, torch.float32, every=0)
            for name, shape in zip(Decoder._fields, shapes, strict=True)
        }

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        return {"codes": PartSpec(rows, settings["codes"])}

    def lookup_counts(
        self,
        stored: Mapping[str, Tensor],
        counts: Tensor,
        settings: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        return {"codes": counts}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        return decode(parts["codes"](ids), Decoder(**stored))


COMPOSITION: Composition = NeuralCodesComposition()


class NeuralCodes(ComposingStep):
    """Make embedding tables of short codes and a small network that decodes them."""

    kind: Literal["neural_codes"] = "neural_codes"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    codes: float = Field(
        0.5, gt=0, description="Below 1: share of a table's width. From 1 on: numbers a row."
    )
    hidden: int = Field(
        64,
        ge=1,
        description="Width of the decoder's hidden layer. It is narrower where a table is short: "
        "the hidden layer takes at most a quarter of the numbers of the codes.",
    )
    steps: int = Field(
        1000, ge=0, description="Training steps for each table, of 4096 rows at most."
    )
    weighted: bool = Field(
        False,
        description="Rows count by how often training looks them up, instead of all the same.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, if lookup counts are used."""
        return ("train",) if self.weighted else ()

    def plan(self, model: Model, bench: Bench) -> StepPlan[Designs]:
        """Select the tables to encode; give a reason for each other table."""

        def shaped(rows: int, dim: int) -> Design | Reason:
            size = share_or_number(self.codes, dim)
            hidden = min(self.hidden, int(MOST_SHARE * rows * size) // (size + 1 + dim))
            if hidden < 1:
                return Reason("too_short_for_decoder", rows=rows, dim=dim, codes=size)
            reason = Reason("decoded_codes", dim=dim, codes=size, hidden=hidden)
            return Design(COMPOSITION, {"codes": size, "hidden": hidden}, reason)

        return choose_composed(model, self.tables, self.min_rows, self.kind, shaped)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> Applied:
        """Fit codes and a decoder to every selected table."""
        designs = plan.payload
        weights = row_weights(model, bench, designs, weighted=self.weighted)

        def fitted(name: str, table: Tensor, design: Design) -> FittedParts:
            size, hidden = design.settings["codes"], design.settings["hidden"]
            codes, decoder = fit(table, weights[name], size, hidden, self.steps, bench.seed)
            return FittedParts(decoder._asdict(), {"codes": codes})

        return recompose(model, designs, fitted)
