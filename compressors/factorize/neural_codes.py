"""Neural codes: store each row of a table as a short code that a small network decodes.

Row ``id`` is ``codes[id] @ projection + relu(codes[id] @ inner + bias) @ outer + mean``: a low-rank
approximation plus a nonlinear correction, for rows that are close to a curved surface. ``inner``
and ``bias`` are the hidden layer of the decoder, ``outer`` is its output layer, and ``projection``
is a linear connection that skips the hidden layer.

Source: Kang et al. 2021, https://arxiv.org/abs/2010.10784 (deep hash embeddings: a decoder makes
rows from dense codes); Hinton and Salakhutdinov 2006 (autoencoders compared with principal
components).
Differs: codes are fitted to a trained table together with the decoder, starting from the truncated
singular value decomposition, so the error is never larger than that of ``low_rank`` with as many
numbers per row. The decoder has one hidden layer, and its last layer is solved by least squares. In
Kang et al. codes are hashes that are not stored, and the decoder is large.
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
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.factorize.low_rank import factorize

BATCH = 4096
"""Rows of one training step."""

BLOCK = 65_536
"""Rows that are decoded at once outside of training, to limit memory."""

CODE_RATE, DECODER_RATE = 0.01, 0.003
"""Adam's learning rates of codes and decoder, for codes whose root mean square is 1."""

MAX_SHARE = 0.25
"""Most numbers in the hidden and output layer together, as a share of the numbers in all codes."""

DAMPING = 1e-9
"""Added to the diagonal of the last layer's normal equations, as a share of its mean."""


class Decoder(NamedTuple):
    """Decoder from a code to a row: two layers and a linear skip connection.

    Attributes:
        projection: weight of the skip connection, ``(code, dim)``.
        inner: weight of the hidden layer, ``(code, hidden)``.
        bias: bias of the hidden layer, ``(hidden,)``.
        outer: weight of the output layer, ``(hidden, dim)``.
        mean: bias of the output, ``(dim,)``; initially the mean row.
    """

    projection: Tensor
    inner: Tensor
    bias: Tensor
    outer: Tensor
    mean: Tensor


def decode(codes: Tensor, decoder: Decoder) -> Tensor:
    """Decode codes ``(*, code)`` to rows ``(*, dim)``."""
    hidden = F.relu(torch.matmul(codes, decoder.inner) + decoder.bias)  # (*, hidden)
    linear = torch.matmul(codes, decoder.projection)
    return linear + torch.matmul(hidden, decoder.outer) + decoder.mean


def squared_error(table: Tensor, weight: Tensor, codes: Tensor, decoder: Decoder) -> float:
    """Return the weighted squared error of all rows, summed in float64.

    Args:
        table: float32 ``(rows, dim)``.
        weight: weight of each row, float64 ``(rows,)``.
        codes: float32 ``(rows, code)``.
        decoder: the decoder.
    """
    total = 0.0
    for begin in range(0, len(table), BLOCK):
        block = slice(begin, begin + BLOCK)
        difference = decode(codes[block], decoder) - table[block]
        total += float((weight[block] * difference.double().square().sum(dim=1)).sum())
    return total


def fit(
    table: Tensor, weight: Tensor, size: int, hidden: int, adam_steps: int, seed: int
) -> tuple[Tensor, Decoder]:
    """Fit codes and a decoder to the rows of a table by squared error.

    Three candidates are computed, and the one with the smallest error is returned:

    1. the low-rank approximation of rank ``size``, without a correction;
    2. the codes of the first, a random hidden layer, and the output (``projection``, ``outer`` and
       ``mean``) that least squares gives for them;
    3. codes and decoder of the second after training with Adam, with the output solved again.

    Training uses batches of rows, or all rows if the table is short.

    Args:
        table: float, ``(rows, dim)``.
        weight: weight of each row's squared error, ``(rows,)``, all positive.
        size: numbers per code, at most ``dim``.
        hidden: width of the hidden layer.
        adam_steps: number of training steps, which limits the time; with 0, codes and hidden layer
            are not trained.
        seed: seed of the hidden layer and of the order of rows.

    Returns:
        ``codes`` float32 ``(rows, size)`` and the decoder, float32.
    """
    rows, relative_weight = table.float(), weight.double() / weight.double().mean()
    initial_codes, projection, mean = factorize(rows, size, relative_weight)
    # Training is on codes and rows divided by this number.
    divisor = float(initial_codes.square().mean().sqrt()) or 1.0
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(size, hidden, generator=generator) / size**0.5
    bias = torch.randn(hidden, generator=generator)
    no_correction = torch.zeros(hidden, table.shape[1])
    best = initial_codes, Decoder(projection, inner / divisor, bias, no_correction, mean)
    least_error = squared_error(rows, relative_weight, *best)
    scaled = rows / divisor
    codes = initial_codes / divisor
    decoder = Decoder(projection, inner, bias, no_correction, mean / divisor)
    for trains in (False, True):  # candidates 2 and 3
        if trains:
            codes, decoder = _train(scaled, relative_weight, codes, decoder, adam_steps, generator)
        decoder = _solve_last_layer(scaled, relative_weight, codes, decoder)
        candidate = codes * divisor, _rescale(decoder, divisor)
        error = squared_error(rows, relative_weight, *candidate)
        if error < least_error:
            best, least_error = candidate, error
    return best


def _rescale(decoder: Decoder, divisor: float) -> Decoder:
    """Convert a decoder for codes and rows divided by ``divisor`` to one for the original size."""
    return Decoder(
        decoder.projection,
        decoder.inner / divisor,
        decoder.bias,
        decoder.outer * divisor,
        decoder.mean * divisor,
    )


def _solve_last_layer(table: Tensor, weight: Tensor, codes: Tensor, decoder: Decoder) -> Decoder:
    """Replace ``projection``, ``outer`` and ``mean`` by their least-squares optimum.

    The codes and the hidden layer are fixed.
    """
    size, hidden = decoder.inner.shape
    width = size + hidden + 1
    matrix = torch.zeros(width, width, dtype=torch.float64)
    right_side = torch.zeros(width, table.shape[1], dtype=torch.float64)
    for begin in range(0, len(table), BLOCK):
        block = slice(begin, begin + BLOCK)
        activations = F.relu(codes[block] @ decoder.inner + decoder.bias)
        ones = torch.ones(len(activations), 1)
        inputs = torch.cat([codes[block], activations, ones], dim=1).double()  # (block, width)
        weighted = inputs * weight[block].unsqueeze(1)
        matrix += weighted.T @ inputs
        right_side += weighted.T @ table[block].double()
    # A hidden neuron that is zero for all rows would make the matrix singular.
    damping = DAMPING * matrix.diagonal().mean()
    matrix.diagonal().add_(damping)
    last = torch.linalg.solve(matrix, right_side).float()
    return decoder._replace(projection=last[:size], outer=last[size:-1], mean=last[-1])


def _train(
    table: Tensor,
    weight: Tensor,
    codes: Tensor,
    decoder: Decoder,
    adam_steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Decoder]:
    """Train codes and decoder with Adam and a cosine learning rate schedule.

    A batch changes only the codes of its rows, so the time of a training step does not depend on
    the number of rows.
    """
    rows = len(table)
    code_table = torch.nn.Embedding(
        rows, codes.shape[1], sparse=rows > BATCH, _weight=codes.clone()
    )
    parameters = [tensor.clone().requires_grad_(True) for tensor in decoder]
    adam = torch.optim.SparseAdam if rows > BATCH else torch.optim.Adam
    optimizers: list[torch.optim.Optimizer] = [
        adam(code_table.parameters(), lr=CODE_RATE),
        torch.optim.Adam(parameters, lr=DECODER_RATE),
    ]
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(adam_steps, 1))
        for optimizer in optimizers
    ]
    permutation, begin = torch.empty(0, dtype=torch.int64), 0
    for _ in range(adam_steps):
        if begin + min(rows, BATCH) > len(permutation):
            permutation, begin = torch.randperm(rows, generator=generator), 0
        ids = permutation[begin : begin + BATCH]
        begin += len(ids)
        difference = decode(code_table(ids), Decoder(*parameters)) - table[ids]
        loss = (weight[ids].float() * difference.square().sum(dim=1)).mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return code_table.weight.detach(), Decoder(*(tensor.detach() for tensor in parameters))


@dataclass(frozen=True)
class NeuralCodesComposition:
    """A table composed of one smaller table (its *part*) and the tensors of ``Decoder``.

    The part is ``codes`` ``(rows, code)``. The protocol ``Composition``
    (``core/modules/composed.py``) explains the methods. ``learned``: names of the stored tensors
    that training may change. ``rows_per_entry=0``: a tensor belongs to the whole table, not to its
    rows.
    """

    name: str = "neural_codes"
    learned: tuple[str, ...] = Decoder._fields

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        size, hidden = settings["codes"], settings["hidden"]
        shapes = ((size, dim), (size, hidden), (hidden,), (hidden, dim), (dim,))
        return {
            name: TensorSpec(shape, torch.float32, rows_per_entry=0)
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
    """Replace embedding tables by short codes and a small network that decodes them."""

    kind: Literal["neural_codes"] = "neural_codes"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    codes: float = Field(
        0.5,
        gt=0,
        description="Numbers per code. Below 1: as a share of the table's width. From 1 on: a "
        "number.",
    )
    hidden: int = Field(
        64,
        ge=1,
        description="Largest width of the decoder's hidden layer. For short tables it is smaller: "
        "the decoder's two layers have at most a quarter as many numbers as the codes.",
    )
    steps: int = Field(
        1000, ge=0, description="Training steps for each table, each on up to 4096 rows."
    )
    weighted: bool = Field(
        False,
        description="Weight the error of each row by its lookups in the training data. False: all "
        "rows have equal weight.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, if lookup counts are used."""
        return ("train",) if self.weighted else ()

    def plan(self, model: Model, bench: Bench) -> StepPlan[Designs]:
        """Select the tables to encode; give a reason for each other table."""

        def design(rows: int, dim: int) -> Design | Reason:
            size = share_or_number(self.codes, dim)
            hidden = min(self.hidden, int(MAX_SHARE * rows * size) // (size + 1 + dim))
            if hidden < 1:
                return Reason("too_short_for_decoder", rows=rows, dim=dim, codes=size)
            reason = Reason("decoded_codes", dim=dim, codes=size, hidden=hidden)
            return Design(COMPOSITION, {"codes": size, "hidden": hidden}, reason)

        return choose_composed(model, self.tables, self.min_rows, self.kind, design)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> AppliedStep:
        """Fit codes and a decoder to every selected table.

        Raises:
            RowsMissing: ``weighted`` is set, and there are no training rows.
        """
        designs = plan.payload
        weights = row_weights(model, bench, designs, weighted=self.weighted)

        def fit_table(name: str, table: Tensor, design: Design) -> FittedParts:
            size, hidden = design.settings["codes"], design.settings["hidden"]
            codes, decoder = fit(table, weights[name], size, hidden, self.steps, bench.seed)
            return FittedParts(stored=decoder._asdict(), parts={"codes": codes})

        return recompose(model, designs, fit_table)
