"""Quantization-aware training of tables: train rows through the rounding of a row-wise format.

During training, a table has float weights. Each lookup rounds its rows to the levels of the format,
and gradients pass straight through the rounding to the weights. After training, the weights are
encoded in the format, and the table returns the rounded rows of the best epoch in validation, bit
for bit. So the other weights of a row, and the other tables, adapt to the rounding errors.

Papers: Bengio et al. 2013, https://arxiv.org/abs/1308.3432 (straight-through gradients); Li et al.
2023, https://arxiv.org/abs/2212.05735 (training of embeddings in low precision).
Differs from the second: float weights are kept while training, and the scale of a row is computed
from its largest weight instead of being learned, because rows are looked up rarely.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, Part
from compressors.core.model import Model
from compressors.core.modules.formats import rows_per_group
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import (
    AppliedStep,
    Decision,
    StepPlan,
    choose_tables,
    selected_units,
)
from compressors.core.steps.step import StepSettings, TableStep
from compressors.core.steps.table_encoder import encode_table
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.core.units import Unit, pack_table, swap
from compressors.distill.soft_labels import build_mixed_loss
from compressors.distill.training.settings import SoftShare, Temperature, Training
from compressors.distill.training.training_steps import (
    require_loss,
    require_training_rows,
    train_units,
)
from compressors.quantize.kernels.levels import ScaleType
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

Encoder = RowwiseInt8 | RowwiseInt4 | RowwiseInt2
ENCODERS: Mapping[int, type[Encoder]] = {8: RowwiseInt8, 4: RowwiseInt4, 2: RowwiseInt2}
"""The step that encodes the trained table, by the number of bits of a weight."""


class RoundedTable(nn.Embedding):
    """A table in training: looked-up rows are rounded as the encoded table would return them.

    In evaluation mode, its output equals that of the encoded table. Gradients pass to ``weight``,
    float32 ``(rows, dim)``, as if rows were not rounded.

    Args:
        table: the float table, an ``nn.Embedding`` or ``nn.EmbeddingBag``, whose weight is shared.
        encoder: the step that encodes the table after training.
    """

    def __init__(self, table: nn.Embedding | nn.EmbeddingBag, encoder: TableStep) -> None:
        super().__init__(1, 1)  # its weight is replaced below: no large tensor is allocated
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        # ``Bag``, which replaces an EmbeddingBag in training, masks padding itself.
        self.padding_idx = table.padding_idx if isinstance(table, nn.Embedding) else None
        self.weight = table.weight
        self.encoder = encoder
        rows, dim = table.weight.shape
        self.group = rows_per_group(encoder.storage.layout(rows, dim, encoder.settings()))
        """Number of neighbouring rows that share an entry of a stored tensor, such as a scale."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for the ids
        """Return rows float32 ``(*ids, dim)`` of ids int ``(*ids,)``."""
        rounded = self.rounded_rows(input)
        if not torch.is_grad_enabled():
            return rounded
        rows = F.embedding(input, self.weight, self.padding_idx)
        return rows + (rounded - rows).detach()

    @torch.no_grad()
    def rounded_rows(self, ids: Tensor) -> Tensor:
        """Encode the looked-up rows, with all rows that share their scales, and decode them."""
        groups, position = torch.unique(ids.long() // self.group, return_inverse=True)
        rows = groups[:, None] * self.group + torch.arange(self.group, device=ids.device)
        # The last group may be incomplete; a repeated row does not change the largest weight.
        rows = rows.flatten().clamp(max=self.num_embeddings - 1)
        stored = self.encoder.encode(self.weight[rows].cpu(), {})  # encoders run on the CPU
        local_ids = (position * self.group + ids % self.group).cpu()
        rounded = self.encoder.storage.lookup(
            stored, local_ids, self.embedding_dim, self.encoder.settings()
        )
        return rounded.to(self.weight.device)


class TableQAT(StepSettings):
    """Train tables with rounded rows, and store them as 8-, 4- or 2-bit integers."""

    trains_towers: ClassVar[bool] = True  # it can train models with two towers

    kind: Literal["table_qat"] = "table_qat"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    bits: Literal[8, 4, 2] = Field(4, description="Bits of a stored weight.")
    scale: ScaleType = Field("float16", description="How scales are stored.")
    rows_per_scale: Literal[1, 2, 4, 8, 16, 32, 64, 128, 256] = Field(
        1, description="Number of neighbouring rows that share a scale."
    )
    soft_share: SoftShare = 0.5  # weight of the original model's predictions in the training loss
    temperature: Temperature = 1.0
    training: Training = Field(
        default_factory=lambda: Training(epochs=5, learning_rate=1e-3, tables=True),
        description="How the tables are trained; 'tables' has no effect.",
    )

    @property
    def trains(self) -> bool:
        """True: the step trains the network."""
        return True

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training and validation rows, soft labels if used, and what ``training`` needs."""
        parts: tuple[Part, ...] = ("train", "validation", *self.training.needs)
        return (*parts, "soft_labels") if self.soft_share else parts

    @property
    def encoder(self) -> Encoder:
        """The step that encodes the trained tables.

        Levels are symmetric and no weight is clipped: training adapts the weights to the levels,
        and a search for the best range at every lookup would take most of the time.
        """
        return ENCODERS[self.bits](
            tables=self.tables,
            min_rows=self.min_rows,
            scale=self.scale,
            rows_per_scale=self.rows_per_scale,
            symmetric=True,
            clipping="min_max",
        )

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the float32 tables that become smaller; give a reason for each other table.

        Raises:
            NothingToCompress: the signature's task has no loss to train with.
        """
        require_loss(bench, self.kind, self.training)
        encoder = self.encoder
        decisions = choose_tables(
            Unit.of(model.module),
            self.tables,
            self.min_rows,
            self.kind,
            encoder.storage,
            encoder.settings(),
        )
        return StepPlan(decisions, None)  # None: apply() needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Train the selected tables, and modules that are not units, such as norms.

        The result has the weights of the best epoch in validation.

        Raises:
            RowsMissing: the bench lacks training or validation rows, or soft labels.
            TrainingFailed: training diverged.
        """
        require_training_rows(bench)
        module, encoder = model.module, self.encoder
        units = Unit.of(module)
        originals = {unit.name: unit.module for unit in selected_units(units, plan.decisions)}
        tables = {name: _rounded(table, encoder) for name, table in originals.items()}
        # ``pack_table`` puts the new table into a ``Bag`` if it replaces an EmbeddingBag.
        for name, table in tables.items():
            swap(module, name, pack_table(originals[name], table))
        loss = build_mixed_loss(
            bench, self.soft_share, self.temperature, self.kind, original=model.original
        )
        outcome = train_units(model, bench, loss, self.training, units, tables)
        for name, table in tables.items():
            packed = encode_table(encoder, table.weight.detach())
            swap(module, name, pack_table(originals[name], packed))
        return AppliedStep(model, dict.fromkeys(tables, Decision("taken", outcome)))

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected table by one in the format, with zeros that take no memory."""
        encoder = self.encoder
        units = plan.units(model.module)
        return dry_run_packed(model, units, table=encoder.storage, settings=encoder.settings())


def _rounded(table: nn.Module, encoder: TableStep) -> RoundedTable:
    assert isinstance(table, nn.Embedding | nn.EmbeddingBag)  # noqa: S101 - see ``choose_tables``
    return RoundedTable(table, encoder)
