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
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.batches import example
from compressors.contracts import Bench, Change, Frozen, Part, Schema
from compressors.errors import CompressionError
from compressors.loss import hard_loss, shuffled
from compressors.model import Model
from compressors.units import Choice, Unit, choose_dense, own_weight, private_copy
from compressors.widths import Channels as Readers
from compressors.widths import NotAWidth, Width, find_widths, full_config, trace, with_value

Importance = Literal["l1", "l2", "gradient", "random"]
CHECK_ROWS = 32


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
                read = sizes[f"{reader}.weight"]  # (out, in), or (in,) of a norm
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


@dataclass(frozen=True)
class _Cut:
    """What one width loses."""

    width: Width
    readers: Readers
    count: int


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
        """Which dense layers become narrower, which follow, and why the others do not."""
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
            CompressionError: the narrower network is not the old one without those channels.
        """
        return self._cut(model, bench, self._sizes(model, bench))

    def outline(self, model: Model, bench: Bench) -> Model:
        """Cut the last channels of every width: as many as importance would choose."""
        weights = model.module.named_parameters(remove_duplicate=False)
        none = {name: torch.zeros(()).expand(weight.shape) for name, weight in weights}
        return self._cut(model, bench, none)

    def _cut(self, model: Model, bench: Bench, sizes: Mapping[str, Tensor]) -> Model:
        cuts, _ = self._cuts(model, bench.signature)
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        config = full_config(model)
        for cut in cuts:
            kept = kept_channels(cut.readers, per_channel(cut.readers, sizes), cut.count)
            outputs.update(kept)
            for (maker, reader), columns in cut.readers.reads.items():
                gone = columns[~kept[maker]].any(dim=0)  # (inputs of the reader,)
                inputs[reader] = inputs.get(reader, torch.ones_like(gone)) & ~gone
            config = with_value(config, cut.width.path, cut.count)
        rows = example(bench.signature, _rows(model.module), CHECK_ROWS)
        expected = _without(model.module, inputs, rows)
        for name in outputs.keys() | inputs.keys():
            _narrow(model.module.get_submodule(name), outputs.get(name), inputs.get(name))
        with torch.no_grad():
            found = model.module(**rows)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
            raise CompressionError(
                f"Without the cut channels the network scores otherwise than with them at zero, by "
                f"up to {float((found - expected).abs().max()):.2g}: some code of it reads the "
                f"channels of {', '.join(sorted(outputs))} past its layers. Leave them out of "
                f"'layers'."
            )
        architecture = model.network.architecture.model_copy(update={"config": config})
        network = model.network.model_copy(update={"architecture": architecture})
        return replace(model, network=network)

    def _cuts(self, model: Model, schema: Schema) -> tuple[list[_Cut], dict[str, Choice]]:
        units = Unit.of(model.module)
        choices = choose_dense(units, self.layers, self.kind)
        widths, reasons = find_widths(model)
        cuts: list[_Cut] = []
        for width in {width.path: width for width in widths.values()}.values():
            why = self._why_not(width, choices)
            readers = None
            if why is None:
                try:
                    readers = trace(model.module, schema, _rows(model.module), width)
                except NotAWidth as fault:
                    why = str(fault)
            if readers is None:
                reasons.update(dict.fromkeys(width.makers, str(why)))
            else:
                cuts.append(_Cut(width, readers, narrower(width.value, self.keep, self.multiple)))
        cut = {maker for item in cuts for maker in item.width.makers}
        for name, choice in choices.items():
            if choice.take and name not in cut:
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


def _rows(module: nn.Module) -> dict[str, int]:
    return {unit.name: unit.rows for unit in Unit.of(module) if unit.role == "table"}


@torch.no_grad()
def _without(module: nn.Module, inputs: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Tensor:
    """Scores where the inputs that will go count as zero."""
    copied = private_copy(module).eval()
    for name, kept in inputs.items():
        layer = copied.get_submodule(name)
        if isinstance(layer, nn.Linear):
            own_weight(layer, "weight", layer.weight.detach() * kept)
    scores: Tensor = copied(**rows)
    return scores


def _narrow(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Keep only some outputs and some inputs of a layer, or some channels of a norm."""
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
        weight = weight if outputs is None else weight[outputs]
        weight = weight if inputs is None else weight[:, inputs]
        own_weight(module, "weight", weight.contiguous())
        if outputs is not None and module.bias is not None:
            own_weight(module, "bias", module.bias.detach()[outputs])
        module.out_features, module.in_features = weight.shape
        return
    if inputs is None:
        return
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dim() != 1:
            continue
        if isinstance(tensor, nn.Parameter):
            own_weight(module, name, tensor.detach()[inputs])
        else:
            setattr(module, name, tensor[inputs])
    size = "num_features" if isinstance(module, nn.BatchNorm1d) else "num_parameters"
    setattr(module, size, int(inputs.sum()))
