"""Build a network without some of its channels, and check that nothing else changed.

The narrower network is built from its configuration, as a server builds it, so code that depends on
a width (a view, a scale of ``width ** -0.5``, another layer of ``width // 16``) uses the new width.
Then both networks score the same synthetic rows, the old network with those channels set to zero.
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
    """A width to reduce to ``count`` units (channels or groups of channels)."""

    width: Width
    readers: Readers
    count: int


def prove(model: Model, signature: Signature, cut: Cut) -> None:
    """Check with randomly selected channels that one width can be reduced.

    Raises:
        NotAWidth: the network cannot be built or run with it, or computes something else.
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
    except Exception as fault:  # any exception of the class means: the width is fixed
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
    """Build the network with fewer channels and compare it with the old one without them.

    Args:
        model: a private copy; its layers are narrowed in place.
        signature: the inputs of the network.
        cuts: the widths to reduce.
        kept: the kept units, by maker, bool ``(units,)``.

    Returns:
        The new network over the remaining tensors, and a description of the difference, or None.
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
    """Describe the difference of two networks on synthetic rows; None if it is only rounding."""
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
    """Find the consumers of the remaining units of a width, for the next round.

    Args:
        readers: the consumers before the width was reduced.
        model: the narrower network.
        signature: the inputs of the network.
        kept: the kept units, by maker, bool ``(units,)``.

    Raises:
        NotAWidth: the remaining units are not consumed as they were before.
    """
    units, count = {}, 0
    for maker, before in readers.units.items():
        mask = kept[maker]
        place, count = mask.cumsum(0) - 1, int(mask.sum())  # new indices of the kept units
        units[maker] = place[before[mask[before]]]
    width = replace(readers.width, value=count)
    return readers_of(width, trace(model.module, signature, table_rows(model.module), width), units)


def rebuilt(
    model: Model,
    config: Mapping[str, Any],
    moved: Callable[[str], str | None] = lambda name: name,
) -> nn.Module:
    """Build the network of a configuration over the tensors and packed modules of another.

    Args:
        model: the other network, narrowed or without some modules.
        config: the new configuration.
        moved: gives the new name of a module or tensor; None if it is removed.

    Raises:
        Exception: any exception of the class, or of torch if tensors do not fit.
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
    """Scores of a network for synthetic rows, float ``(scales, rows)``."""
    return _scores(module, signature, tables, None)


@torch.no_grad()
def rounded_scores(module: nn.Module, signature: Signature, tables: dict[str, int]) -> Tensor:
    """Scores of the same rows with every float32 number rounded differently.

    Each dense weight, looked-up number and dense input changes by at most one step of float32. The
    change of the scores is the rounding error of this network on these rows. It is large if
    intermediate numbers are far larger than their differences, as after a batch norm whose running
    mean is far from the inputs.

    Args:
        module: the network; it is not changed.
        signature: the inputs of the network.
        tables: number of rows of each table.

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

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return rounded(output)

    copied = private_copy(module).eval()
    lookups = nn.Embedding | nn.EmbeddingBag | Bag | PackedTable | ComposedTable
    for part in list(copied.modules()):
        if isinstance(part, lookups):  # a table may be large, so looked-up rows are rounded
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
    """Describe the difference of two networks' scores, in logits if they are probabilities.

    Args:
        found: scores of one network, float ``(scales, rows)``.
        expected: scores of the other network, in the same shape.
        signature: whether scores are probabilities.
        rounded: returns scores of one network with different rounding, float
            ``(draws, scales, rows)``; differences of that size are ignored. Called only if the
            difference is a large share of the spread.

    Returns:
        The difference as text; None if the scores agree.
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
    """Float64 logits of probabilities: click rates are small, so differences of them would be."""
    wide = scores.double()
    return torch.logit(wide, eps=1e-7) if signature.single_output.form == "probability" else wide


def _last_step(scores: Tensor, signature: Signature) -> Tensor:
    """The largest change of a score by one step of float32, for each scale: ``(scales,)``."""
    up = torch.nextafter(scores.float(), torch.full_like(scores, torch.inf, dtype=torch.float32))
    return (_in_logits(up, signature) - _in_logits(scores, signature)).abs().amax(dim=1)


def _silenced(module: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network with zero weights for the inputs that will be removed."""
    copied = private_copy(module).eval()
    for name, kept in inputs.items():
        layer = copied.get_submodule(name)
        if isinstance(layer, nn.Linear):
            own_weight(layer, "weight", layer.weight.detach() * kept)
    return copied


def _narrow(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Keep only the given outputs and inputs of a layer, or channels of a norm."""
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
