"""A network without some of its channels, and the proof that nothing else is missing.

The narrower network is built anew from its configuration, as a server would build it, so code that
remembers a width (a view, a scale of ``width ** -0.5``, another layer of ``width // 16``) meets the
new one. Then both networks score the same made-up rows: the old one with those channels counting as
zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import DenseInput, Signature, is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.core.batches import example
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.factored import FactoredLinear
from compressors.core.modules.formats import Bag, FoldedNorm, PackedLinear, PackedTable
from compressors.core.modules.output_calibration import attach, recalibration_of
from compressors.core.state.construction import assign, construct
from compressors.core.units import own_weight, private_copy, swap, table_rows
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.channel_consumers import Readers, readers_of, trace
from compressors.prune.structure.config_widths import Width, with_value

CHECK_ROWS = 128
SCALES = (1.0, 30.0)
"""Dense inputs of two sizes: some bends, such as Relu6's upper one, are far from zero."""

TOLERANCE = 1e-3
"""Largest gap as a share of the scores' spread. Float32 sums in another order usually stay far
below; one channel too many or in another's place moves some score by more."""

ROUNDING_DRAWS = 4
ROUNDING_FACTOR = 32.0
"""Largest gap as a multiple of what rounding alone changes. A sum of some hundred terms in another
order differs by a few times the change that one rounding of each weight causes."""


@dataclass(frozen=True)
class Cut:
    """What one width loses: it keeps ``count`` units, channels or groups of them."""

    width: Width
    readers: Readers
    count: int


def prove(model: Model, signature: Signature, cut: Cut) -> None:
    """Try one width with channels drawn by chance, before it is relied on.

    Raises:
        NotAWidth: the network cannot be built or run with it, or is then another one.
    """
    drawn = torch.Generator().manual_seed(0)
    kept = {}
    for group in cut.readers.tied:
        mask = torch.zeros(cut.width.value, dtype=torch.bool)
        mask[torch.randperm(cut.width.value, generator=drawn)[: cut.count]] = True
        kept.update(dict.fromkeys(group, mask))
    private = replace(model, module=private_copy(model.module))
    try:
        _, gap = without_channels(private, signature, [cut], kept)
    except Exception as fault:  # whatever a class raises, it says that this width is not free
        if is_out_of_memory(fault):
            raise
        width = cut.width.description()
        fails = Reason("narrower_fails", width=width, count=cut.count, fault=str(fault))
        raise NotAWidth(fails) from fault
    if gap is not None:
        raise NotAWidth(Reason("channels_read", gap=gap))


def without_channels(
    model: Model, signature: Signature, cuts: Sequence[Cut], kept: Mapping[str, Tensor]
) -> tuple[Model, str | None]:
    """The network with fewer channels, and by how much it is not the old one without them.

    Args:
        model: of a private tree; its layers are narrowed in place.
        signature: of its inputs.
        cuts: the widths.
        kept: by maker, bool ``(units,)``.

    Returns:
        The new network over the tensors that are left, and the gap in words, or None.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    architecture = model.network.architecture
    config = architecture.config
    for cut in cuts:
        for (maker, reader), columns in cut.readers.reads.items():
            gone = columns[~kept[maker]].any(dim=0)  # (inputs of the reader,)
            inputs[reader] = inputs.get(reader, torch.ones_like(gone)) & ~gone
        for maker, units in cut.readers.units.items():
            outputs[maker] = kept[maker][units]  # (channels,)
        config = with_value(model.architecture, config, cut.width.path, cut.count)
    tables = table_rows(model.module)
    expected = made_up_scores(_silenced(model.module, inputs), signature, tables)
    for name in outputs.keys() | inputs.keys():
        _narrow(model.module.get_submodule(name), outputs.get(name), inputs.get(name))
    network = model.network.model_copy(
        update={"architecture": architecture.model_copy(update={"config": config})}
    )
    module = rebuilt(model, config)
    scores = made_up_scores(module, signature, tables)
    gap = gap_of(scores, expected, signature, lambda: rounded_scores(module, signature, tables))
    return replace(model, module=module, network=network), gap


def apart(found: nn.Module, expected: nn.Module, signature: Signature) -> str | None:
    """How far two networks with the same tables are apart on made-up rows; None: by rounding."""
    tables = table_rows(expected)
    return gap_of(
        made_up_scores(found, signature, tables),
        made_up_scores(expected, signature, tables),
        signature,
        lambda: rounded_scores(expected, signature, tables),
    )


def left_of(
    readers: Readers, model: Model, signature: Signature, kept: Mapping[str, Tensor]
) -> Readers:
    """Who reads what is left of a width, for the next cut.

    Args:
        readers: before the cut.
        model: the narrower network.
        signature: of its inputs.
        kept: by maker, bool ``(units,)``.

    Raises:
        NotAWidth: what is left is read in another way than all of it was.
    """
    units, count = {}, 0
    for maker, before in readers.units.items():
        mask = kept[maker]
        place, count = mask.cumsum(0) - 1, int(mask.sum())  # the new number of what stays
        units[maker] = place[before[mask[before]]]
    width = replace(readers.width, value=count)
    return readers_of(width, trace(model.module, signature, table_rows(model.module), width), units)


def rebuilt(
    model: Model,
    config: Mapping[str, Any],
    moved: Callable[[str], str | None] = lambda name: name,
) -> nn.Module:
    """The network of a configuration over the tensors and packed modules of another.

    Args:
        model: the other network; narrowed, or with names that stand elsewhere now.
        config: the new configuration.
        moved: the new name of a module or tensor; None if it is gone.

    Raises:
        Exception: whatever the class raises, or torch where tensors do not fit.
    """
    built = construct(model.architecture, config).module
    for name, part in model.module.named_modules():
        packed = ComposedTable | PackedTable | FactoredLinear | PackedLinear | FoldedNorm | Bag
        if isinstance(part, packed):
            new = moved(name)
            if new is not None:
                swap(built, new, part)
    recalibration = recalibration_of(model.module)
    if recalibration is not None:
        attach(built, recalibration)
    tensors = {moved(k): tensor for k, tensor in model.module.state_dict(keep_vars=True).items()}
    assign(built, {k: t for k, t in tensors.items() if k is not None}, strict=True)
    return built.eval()


@torch.no_grad()
def made_up_scores(module: nn.Module, signature: Signature, tables: dict[str, int]) -> Tensor:
    """Scores of a network for made-up rows, float ``(scales, rows)``."""
    return _scores(module, signature, tables, None)


@torch.no_grad()
def rounded_scores(module: nn.Module, signature: Signature, tables: dict[str, int]) -> Tensor:
    """Scores of the same rows with every float32 number rounded otherwise.

    Each dense weight, looked-up number and dense input changes by at most one step of float32. What
    that does to the scores is the rounding error of this network on these rows: large where
    intermediate numbers are far larger than their differences, as behind a batch norm whose
    running mean is far from the inputs.

    Args:
        module: left as it is.
        signature: of its inputs.
        tables: rows of each table.

    Returns:
        Float ``(draws, scales, rows)``.
    """
    return torch.stack(
        [_perturbed(module, signature, tables, draw) for draw in range(ROUNDING_DRAWS)]
    )


def _perturbed(
    module: nn.Module, signature: Signature, tables: dict[str, int], seed: int
) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)

    def rounded(x: Tensor) -> Tensor:
        step = torch.finfo(torch.float32).eps
        return x * (1 + step * torch.randint(-1, 2, x.shape, generator=drawn))

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        return rounded(output)

    copied = private_copy(module).eval()
    lookups = nn.Embedding | nn.EmbeddingBag | Bag | PackedTable | ComposedTable
    for part in list(copied.modules()):
        if isinstance(part, lookups):  # may be large: what is looked up is rounded, not the table
            part.register_forward_hook(hook)
            continue
        for name, tensor in list(part.named_parameters(recurse=False)):
            if tensor.is_floating_point():
                own_weight(part, name, rounded(tensor.detach()))
        if isinstance(part, nn.BatchNorm1d) and part.running_mean is not None:
            part.running_mean = rounded(part.running_mean)
    return _scores(copied, signature, tables, rounded)


def _scores(
    module: nn.Module,
    signature: Signature,
    tables: dict[str, int],
    rounded: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    scores = []
    for scale in SCALES:
        rows = example(signature, tables, CHECK_ROWS)
        for item in signature.inputs:
            if isinstance(item, DenseInput):
                scaled = rows[item.name] * scale
                rows[item.name] = scaled if rounded is None else rounded(scaled)
        scores.append(module(**rows).reshape(-1))
    return torch.stack(scores)


def gap_of(
    found: Tensor,
    expected: Tensor,
    signature: Signature,
    rounded: Callable[[], Tensor] | None = None,
) -> str | None:
    """Describe how far scores are apart, in logits where they are probabilities.

    Args:
        found: scores of one network, float ``(scales, rows)``.
        expected: scores of the other.
        signature: says whether scores are probabilities.
        rounded: gives scores of one of them with other rounding, float ``(draws, scales, rows)``:
            gaps of that size say nothing. Called only where the gap is a large share of the spread.

    Returns:
        The gap in words; None if the scores agree.
    """
    first, second = _in_logits(found, signature), _in_logits(expected, signature)
    largest = (first - second).abs().amax(dim=1)  # (scales,)
    spread = second.std(dim=1) + 1e-3 * second.abs().amax(dim=1)
    spread = spread.clamp(min=1e-12)
    if bool((largest <= TOLERANCE * spread).all()):
        return None
    allowed = TOLERANCE * spread
    if rounded is not None:
        again = _in_logits(rounded(), signature)  # (draws, scales, rows)
        noise = (again - again[:1]).abs().amax(dim=(0, 2))
        noise = torch.maximum(noise, _last_step(expected, signature))
        allowed = torch.maximum(allowed, ROUNDING_FACTOR * noise)
    over = ~(largest <= allowed)  # NaN is over
    if not bool(over.any()):
        return None
    return f"{float((largest / spread)[over].max()):.2g} of their spread"


def _in_logits(scores: Tensor, signature: Signature) -> Tensor:
    """Float64 logits of probabilities: a rate of clicks is small, and so would be any gap."""
    wide = scores.double()
    return torch.logit(wide, eps=1e-7) if signature.output == "probability" else wide


def _last_step(scores: Tensor, signature: Signature) -> Tensor:
    """By how much one step of float32 moves a score, the largest of each scale: ``(scales,)``."""
    up = torch.nextafter(scores.float(), torch.full_like(scores, torch.inf, dtype=torch.float32))
    return (_in_logits(up, signature) - _in_logits(scores, signature)).abs().amax(dim=1)


def _silenced(module: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """The network whose layers do not hear the inputs that will go."""
    copied = private_copy(module).eval()
    for name, kept in inputs.items():
        layer = copied.get_submodule(name)
        if isinstance(layer, nn.Linear):
            own_weight(layer, "weight", layer.weight.detach() * kept)
    return copied


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
