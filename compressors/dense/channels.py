"""Dense layers with whole output channels removed: smaller matrices, faster on every target.

Removing an output of one layer removes the inputs of all that read it (``compressors.widths``),
and the number of the architecture's configuration that says how wide the layer is becomes
smaller, so the result is stored and built like any other network.

Source: Li et al. 2017, https://arxiv.org/abs/1608.08710 (L1 norm of a filter); Molchanov et al.
2019, https://arxiv.org/abs/1906.10771, eq. 8 (first-order Taylor importance).
Differs: a channel is judged by its own weights and by the weights that read it together, as
dependency groups are (Fang et al. 2023, https://arxiv.org/abs/2301.12900); and layers that share
one number of the configuration lose the same share.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Change, Frozen, Part, Schema
from compressors.dense.narrowing import Cut, prove, without_channels
from compressors.errors import CompressionError, NothingToCompress
from compressors.loss import hard_loss, shuffled
from compressors.model import Model
from compressors.units import Choice, Unit, choose_dense, own_weight, private_copy, table_rows
from compressors.widths import Channels as Readers
from compressors.widths import NotAWidth, Width, find_widths, trace

Importance = Literal["l1", "l2", "gradient", "random"]


def narrower(value: int, keep: float, multiple: int) -> int:
    """The new width: ``keep`` of the old one to the nearest multiple, at least one of them."""
    return max(multiple, round(value * keep / multiple) * multiple)


def per_channel(readers: Readers, sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the weights of each channel come to: its own and those that read it.

    Args:
        readers: who reads what.
        sizes: by parameter name, a number for every weight, in the parameter's shape.

    Returns:
        By maker, float ``(channels,)``.
    """
    totals = {}
    for maker in readers.width.makers:
        total = sizes[f"{maker}.weight"].sum(dim=1)  # (channels,)
        if f"{maker}.bias" in sizes:
            total = total + sizes[f"{maker}.bias"]
        for (name, reader), columns in readers.reads.items():
            if name == maker:
                read = sizes.get(f"{reader}.weight")  # (out, in), or (in,) of a norm
                if read is None:  # a norm without weights
                    continue
                read = read.sum(dim=0) if read.dim() == 2 else read  # (in,)
                total = total + columns.to(read.dtype) @ read
        totals[maker] = total
    return totals


def kept_channels(
    readers: Readers, importance: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """The channels that stay: by maker, bool ``(channels,)`` with ``count`` True.

    Makers whose channels meet keep the same ones, by the sum of their importances. Of equally
    important channels the first ones stay.
    """
    kept = {}
    for group in readers.tied:
        total = torch.stack([importance[maker] for maker in group]).sum(dim=0)
        best = total.sort(descending=True, stable=True).indices[:count]
        mask = torch.zeros(len(total), dtype=torch.bool)
        mask[best] = True
        kept.update(dict.fromkeys(group, mask))
    return kept


class Channels(Frozen):
    """Remove whole output channels of dense layers, and the inputs that read them."""

    kind: Literal["channels"] = "channels"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to narrow: module names, with * for any characters."
    )
    keep: float = Field(0.5, gt=0, lt=1, description="Share of the channels that stay.")
    multiple: int = Field(8, ge=1, description="Widths are rounded to a multiple of this.")
    importance: Importance = Field(
        "l2",
        description="What a channel is judged by: the L1 or L2 norm of its weights, the loss's "
        "gradient times its weights on training rows, or chance (the honest baseline).",
    )
    rows: int = Field(8192, ge=1, description="Training rows read for 'gradient', at most.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows where gradients are taken."""
        return ("train",) if self.importance == "gradient" else ()

    @property
    def changes(self) -> Change:
        """Layers become narrower and stay in their format."""
        return "values"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """Which dense layers become narrower, which follow, and why the others do not.

        Raises:
            NothingToCompress: gradients are asked for, and the schema's task has no loss.
        """
        if self.importance == "gradient" and bench.signature.task == "retrieval":
            raise NothingToCompress(
                step=self.kind,
                wanted="a model of task 'ctr' or 'ranking' for importance 'gradient'",
                closest="task 'retrieval', which has no loss yet",
                remedy="Choose another importance.",
            )
        cuts, choices = self._cuts(model, bench.signature)
        for cut in cuts:
            for maker in cut.width.makers:
                reason = (
                    f"channels: {cut.width.value} -> {cut.count} outputs ({cut.width.spoken()}) "
                    f"by {self.importance}"
                )
                choices[maker] = _joined(choices[maker], reason)
            for reader in cut.width.readers:
                if reader in choices:
                    makers = [maker for maker, name in cut.readers.reads if name == reader]
                    choices[reader] = _joined(choices[reader], f"inputs follow {', '.join(makers)}")
        return choices

    def apply(self, model: Model, bench: Bench) -> Model:
        """Cut every chosen width and check that nothing but the cut channels is missing.

        Raises:
            CompressionError: the narrower network is not the old one without those channels, or
                no gradient says which channels matter.
        """
        sizes = self._sizes(model, bench)
        if not any(bool(size.any()) for size in sizes.values()):
            raise CompressionError(
                f"'channels' by {self.importance} finds every weight equally unimportant: the loss "
                f"has no gradient on the training rows. Choose another importance."
            )
        return self._cut(model, bench.signature, sizes)

    def outline(self, model: Model, bench: Bench) -> Model:
        """Cut the last channels of every width: as many as importance would choose."""
        weights = model.module.named_parameters(remove_duplicate=False)
        none = {name: torch.zeros(()).expand(weight.shape) for name, weight in weights}
        return self._cut(model, bench.signature, none)

    def _cut(self, model: Model, schema: Schema, sizes: Mapping[str, Tensor]) -> Model:
        cuts, _ = self._cuts(model, schema)
        kept: dict[str, Tensor] = {}
        for cut in cuts:
            kept |= kept_channels(cut.readers, per_channel(cut.readers, sizes), cut.count)
        narrow, gap = without_channels(model, schema, cuts, kept)
        if gap is not None:
            names = ", ".join(sorted(kept))
            raise CompressionError(
                f"Without the cut channels the network scores otherwise than with them at zero "
                f"({gap}): some code of it reads the channels of {names} past its layers. Leave "
                f"them out of 'layers'."
            )
        return narrow

    def _cuts(self, model: Model, schema: Schema) -> tuple[list[Cut], dict[str, Choice]]:
        units = Unit.of(model.module)
        choices = choose_dense(units, self.layers, self.kind)
        widths, reasons = find_widths(model)
        cuts: list[Cut] = []
        for width in {width.path: width for width in widths.values()}.values():
            count = narrower(width.value, self.keep, self.multiple)
            try:
                why = self._why_not(width, choices)
                if why is not None:
                    raise NotAWidth(why)
                readers = trace(model.module, schema, table_rows(model.module), width)
                cut = Cut(width, readers, count)
                prove(model, schema, cut)
            except NotAWidth as fault:
                reasons.update(dict.fromkeys(width.makers, str(fault)))
            else:
                cuts.append(cut)
        taken = {maker for item in cuts for maker in item.width.makers}
        for name, choice in choices.items():
            if choice.take and name not in taken:
                choices[name] = Choice(False, reasons[name])
        return cuts, choices

    def _why_not(self, width: Width, choices: Mapping[str, Choice]) -> str | None:
        """Why a width stays as it is although it could be cut."""
        for name in width.makers:
            if not choices[name].take:
                return f"shares {width.spoken()} with {name!r}: {choices[name].reason}"
        count = narrower(width.value, self.keep, self.multiple)
        if count >= width.value:
            return (
                f"{width.value} channels: {self.keep:.0%} of them, as a multiple of "
                f"{self.multiple}, is no fewer"
            )
        return None

    def _sizes(self, model: Model, bench: Bench) -> dict[str, Tensor]:
        """By parameter, the importance of every weight; it adds up to a channel's."""
        tables = tuple(unit.name for unit in Unit.of(model.module) if unit.role == "table")
        weights = {
            name: weight.detach()
            for name, weight in model.module.named_parameters(remove_duplicate=False)
            if not name.startswith(tuple(f"{table}." for table in tables))
        }
        if self.importance == "l1":
            return {name: weight.abs() for name, weight in weights.items()}
        if self.importance == "l2":
            return {name: weight.square() for name, weight in weights.items()}
        if self.importance == "random":
            drawn = torch.Generator().manual_seed(bench.seed)
            return {
                name: torch.rand(weight.shape, generator=drawn) for name, weight in weights.items()
            }
        return _taylor(model.module, bench, weights, self.rows)


def _taylor(
    module: nn.Module, bench: Bench, weights: Mapping[str, Tensor], rows: int
) -> dict[str, Tensor]:
    """Squared gradient times weight, summed over batches of training rows."""
    if bench.train is None:
        raise CompressionError("'channels' by gradient needs training rows.")
    copied = private_copy(module).eval()
    leaves: dict[str, nn.Parameter] = {}
    for name, weight in weights.items():
        owner, _, own = name.rpartition(".")
        leaves[name] = own_weight(copied.get_submodule(owner), own, weight)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in shuffled(bench.train, bench.signature, 1024, bench.seed, limit=rows):
        loss = hard_loss(bench.signature, copied(**batch.inputs), batch)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            if grad is not None:
                total[name] += (grad * leaf.detach()).square()
    return total


def _joined(choice: Choice, reason: str) -> Choice:
    return Choice(True, f"{choice.reason}; {reason}" if _is_cut(choice) else reason)


def _is_cut(choice: Choice) -> bool:
    return choice.take and choice.reason.startswith(("channels:", "inputs follow"))
