"""Build a network without some of its channels, and check that nothing else changed.

The narrower network is built from its configuration, as a server builds it, so code that depends on
a width (a view, a scale of ``width ** -0.5``, another layer of ``width // 16``) uses the new width.
Then both networks score the same synthetic rows; in the old network the weights that are applied to
the removed channels are zero. The scores of both must agree.

A *width* is a number in the configuration that sets the number of channels of one or more layers
(``config_widths.py``). A *group* is one channel, or several that the width counts as one (a head),
a *producer* is a layer that outputs the channels, a *consumer* takes them as inputs. A *private
copy* of a network has its own modules and shares the tensors, which are replaced instead of
changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.core.batches import change_columns, dense_columns
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.factored import FactoredLinear
from compressors.core.modules.formats import Bag, FoldedNorm, PackedLinear, PackedTable
from compressors.core.modules.output_calibration import attach, find_recalibration
from compressors.core.modules.pointwise import PointwiseConv
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import network_scores, score_columns
from compressors.core.state.construction import assign, construct
from compressors.core.units import private_copy, replace_parameter, swap, table_rows
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.channel_consumers import WidthConsumers, find_consumers, trace
from compressors.prune.structure.config_widths import Width, replace_value

CHECK_ROWS = 128  # synthetic rows of each scale
SCALES = (1.0, 30.0)
"""Factors for dense inputs: some nonlinearities, such as Relu6, have a bend far from zero."""

TOLERANCE = 1e-3
"""Largest allowed difference as a share of the scores' spread, about their standard deviation over
the rows. Float32 sums in another order usually differ far less; a wrong or misplaced channel
changes some score by more."""

ROUNDING_DRAWS = 4
"""Number of random changes of the network's numbers by which the effect of rounding is measured."""
ROUNDING_FACTOR = 32.0
"""Largest allowed difference as a multiple of the change that rounding causes. The sum of some
hundred terms in another order differs by a few times the change from rounding each weight."""


@dataclass(frozen=True)
class WidthCut:
    """A width that is reduced to ``count`` groups, with the consumers of its channels."""

    width: Width
    consumers: WidthConsumers
    count: int


def require_narrowable(model: Model, signature: Signature, cut: WidthCut) -> None:
    """Require that one width can be reduced; the check removes randomly selected groups.

    Raises:
        NotAWidth: the network cannot be built or run with the smaller width, or its scores differ
            from those of the old network with the removed channels at zero.
    """
    generator = torch.Generator().manual_seed(0)
    kept_by_producer = {}
    for tied in cut.consumers.tied_producers:
        mask = torch.zeros(cut.width.value, dtype=torch.bool)
        mask[torch.randperm(cut.width.value, generator=generator)[: cut.count]] = True
        kept_by_producer.update(dict.fromkeys(tied, mask))
    private = replace(model, module=private_copy(model.module))
    try:
        _, gap = remove_channels(private, signature, [cut], kept_by_producer)
    except Exception as fault:  # any exception of the class means: the width is fixed
        if is_out_of_memory(fault):
            raise
        width = cut.width.description()
        fails = Reason("narrower_fails", width=width, count=cut.count, fault=str(fault))
        raise NotAWidth(fails) from fault
    if gap is not None:
        raise NotAWidth(Reason("channels_read", gap=gap))


def remove_channels(
    model: Model,
    signature: Signature,
    cuts: Sequence[WidthCut],
    kept_by_producer: Mapping[str, Tensor],
) -> tuple[Model, str | None]:
    """Build the network with fewer channels; compare it with the old one without these channels.

    Args:
        model: a private copy; its layers are narrowed in place.
        signature: describes the inputs of the network.
        cuts: the widths to reduce.
        kept_by_producer: the kept groups, by producer, bool ``(groups,)``.

    Returns:
        The new network, and a description of the score difference; None if the scores agree.
    """
    inputs: dict[str, Tensor] = {}  # kept inputs of each consumer
    outputs: dict[str, Tensor] = {}  # kept outputs of each producer
    architecture = model.network.architecture
    config = architecture.config
    for cut in cuts:
        for (producer, consumer), columns in cut.consumers.connections.items():
            removed = columns[~kept_by_producer[producer]].any(dim=0)  # (inputs of the consumer,)
            inputs[consumer] = inputs.get(consumer, torch.ones_like(removed)) & ~removed
        for producer, groups in cut.consumers.groups.items():
            outputs[producer] = kept_by_producer[producer][groups]  # (channels,)
        config = replace_value(model.architecture, config, cut.width.path, cut.count)
    tables = table_rows(model.module)
    expected = synthetic_scores(_copy_with_zero_weights(model.module, inputs), signature, tables)
    for name in outputs.keys() | inputs.keys():
        _narrow(model.module.get_submodule(name), outputs.get(name), inputs.get(name))
    network = model.network.model_copy(
        update={"architecture": architecture.model_copy(update={"config": config})}
    )
    module = rebuild(model, config)
    scores = synthetic_scores(module, signature, tables)
    gap = describe_score_difference(
        scores, expected, signature, lambda: rounded_scores(module, signature, tables)
    )
    return replace(model, module=module, network=network), gap


def score_difference(module: nn.Module, expected: nn.Module, signature: Signature) -> str | None:
    """Describe how two networks' scores of synthetic rows differ; None if only by rounding."""
    tables = table_rows(expected)
    return describe_score_difference(
        synthetic_scores(module, signature, tables),
        synthetic_scores(expected, signature, tables),
        signature,
        lambda: rounded_scores(expected, signature, tables),
    )


def remaining_consumers(
    consumers: WidthConsumers,
    model: Model,
    signature: Signature,
    kept_by_producer: Mapping[str, Tensor],
) -> WidthConsumers:
    """Find the consumers of the remaining groups of a width, for the next round.

    Args:
        consumers: the consumers before the width was reduced.
        model: the narrower network.
        signature: describes the inputs of the network.
        kept_by_producer: the kept groups, by producer, bool ``(groups,)``.

    Raises:
        NotAWidth: the remaining groups are not consumed as they were before.
    """
    groups, count = {}, 0
    for producer, old_groups in consumers.groups.items():
        mask = kept_by_producer[producer]
        new_index, count = mask.cumsum(0) - 1, int(mask.sum())  # of each kept group
        groups[producer] = new_index[old_groups[mask[old_groups]]]
    width = replace(consumers.width, value=count)
    return find_consumers(
        width, trace(model.module, signature, table_rows(model.module), width), groups
    )


def rebuild(
    model: Model,
    config: Mapping[str, Any],
    new_name: Callable[[str], str | None] = lambda name: name,
) -> nn.Module:
    """Build the network of a configuration with the tensors and compressed modules of another one.

    Args:
        model: the other network; its remaining tensors must have the shapes of the new one.
        config: the new configuration.
        new_name: maps the name of a module or tensor to its new name; None if it is removed.

    Raises:
        Exception: any exception of the model class, or of torch if tensors do not fit.
    """
    module = construct(model.architecture, config).module
    for name, part in model.module.named_modules():
        compressed = ComposedTable | PackedTable | FactoredLinear | PackedLinear | FoldedNorm | Bag
        if isinstance(part, compressed | PointwiseConv):
            new_module_name = new_name(name)
            if new_module_name is not None:
                swap(module, new_module_name, part)
    recalibration = find_recalibration(model.module)  # the calibration map of the network's output
    if recalibration is not None:
        attach(module, recalibration)
    state = model.module.state_dict(keep_vars=True)
    tensors = {new_name(name): tensor for name, tensor in state.items()}
    assign(module, {k: tensor for k, tensor in tensors.items() if k is not None}, strict=True)
    return module.eval()


@torch.no_grad()
def synthetic_scores(module: nn.Module, signature: Signature, tables: dict[str, int]) -> Tensor:
    """Return a network's scores of synthetic rows with dense inputs of every scale in ``SCALES``.

    Args:
        module: the network; it is not changed.
        signature: describes its inputs.
        tables: number of rows of each table.

    Returns:
        Float ``(scales, rows)``; with several outputs, the first dimension has one entry for each
        output and scale.
    """
    return _compute_synthetic_scores(module, signature, tables, change=None)


@torch.no_grad()
def rounded_scores(module: nn.Module, signature: Signature, tables: dict[str, int]) -> Tensor:
    """Return scores of the same rows as ``synthetic_scores`` with float32 numbers rounded randomly.

    Each dense weight, looked-up number and dense input changes by a relative amount of at most
    2^-23, the largest relative distance of neighbouring float32 numbers. The change of the scores
    estimates the rounding error of this network on these rows. It is large if intermediate numbers
    are far larger than their differences, as after a batch norm whose running mean is far from the
    inputs.

    Args:
        module: the network; it is not changed.
        signature: describes the inputs of the network.
        tables: number of rows of each table.

    Returns:
        Float ``(draws, scales, rows)``.
    """
    return torch.stack(
        [
            _compute_scores_of_rounded(module, signature, tables, draw)
            for draw in range(ROUNDING_DRAWS)
        ]
    )


def _compute_scores_of_rounded(
    module: nn.Module, signature: Signature, tables: dict[str, int], seed: int
) -> Tensor:
    """Return scores after a random relative change of each number by at most 2^-23 (float32)."""
    generator = torch.Generator().manual_seed(seed)

    def round_randomly(x: Tensor) -> Tensor:
        epsilon = torch.finfo(torch.float32).eps
        return x * (1 + epsilon * torch.randint(-1, 2, x.shape, generator=generator))

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return round_randomly(output)

    copied = private_copy(module).eval()
    lookups = nn.Embedding | nn.EmbeddingBag | Bag | PackedTable | ComposedTable
    for part in list(copied.modules()):
        if isinstance(part, lookups):  # a table may be large, so looked-up rows are rounded
            part.register_forward_hook(hook)
            continue
        for name, tensor in list(part.named_parameters(recurse=False)):
            if tensor.is_floating_point():
                replace_parameter(part, name, round_randomly(tensor.detach()))
        if isinstance(part, nn.BatchNorm1d) and part.running_mean is not None:
            part.running_mean = round_randomly(part.running_mean)
    return _compute_synthetic_scores(copied, signature, tables, round_randomly)


def _compute_synthetic_scores(
    module: nn.Module,
    signature: Signature,
    tables: dict[str, int],
    change: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Return scores of synthetic rows as ``synthetic_scores``; ``change`` maps dense inputs."""
    scores: list[Tensor] = []
    for scale in SCALES:
        rows = generate_inputs(signature, tables, CHECK_ROWS)
        for part in dense_columns(signature):
            rows = change_columns(rows, part, partial(torch.mul, other=scale))
            if change is not None:
                rows = change_columns(rows, part, change)
        scores += score_columns(network_scores(module, rows, signature))
    return torch.stack(scores)


def describe_score_difference(
    scores: Tensor,
    expected: Tensor,
    signature: Signature,
    rounded: Callable[[], Tensor] | None = None,
) -> str | None:
    """Describe the difference of two networks' scores; probabilities are compared as logits.

    Args:
        scores: scores of one network, float ``(scales, rows)``.
        expected: scores of the other network, in the same shape.
        signature: says whether scores are probabilities.
        rounded: a function that returns ``rounded_scores`` of one of the networks, float
            ``(draws, scales, rows)``. Differences up to ``ROUNDING_FACTOR`` times the differences
            between the draws are ignored. It is called only if the difference exceeds ``TOLERANCE``
            times the spread.

    Returns:
        The difference as text; None if the scores agree.
    """
    reference = _to_logits(expected, signature)
    largest = (_to_logits(scores, signature) - reference).abs().amax(dim=1)  # (scales,)
    # The second term matters if all scores are nearly equal, the third if all are zero.
    spread = reference.std(dim=1) + 1e-3 * reference.abs().amax(dim=1)
    spread = spread.clamp(min=1e-12)
    if bool((largest <= TOLERANCE * spread).all()):
        return None
    allowed = TOLERANCE * spread
    if rounded is not None:
        draws = _to_logits(rounded(), signature)  # (draws, scales, rows)
        noise = (draws - draws[:1]).abs().amax(dim=(0, 2))
        noise = torch.maximum(noise, _change_to_next_float32(expected, signature))
        allowed = torch.maximum(allowed, ROUNDING_FACTOR * noise)
    too_large = ~(largest <= allowed)  # also True for NaN
    if not bool(too_large.any()):
        return None
    return f"{float((largest / spread)[too_large].max()):.2g} of their spread"


def _to_logits(scores: Tensor, signature: Signature) -> Tensor:
    """Convert scores to float64, and probabilities to logits.

    Click probabilities are small, so even a large relative error is a small difference of them.
    """
    exact = scores.double()
    is_probability = torch.tensor([output.form == "probability" for output in signature.outputs])
    scales = exact.shape[-2] // len(is_probability)
    return torch.where(
        is_probability.repeat(scales).unsqueeze(1), torch.logit(exact, eps=1e-7), exact
    )


def _change_to_next_float32(scores: Tensor, signature: Signature) -> Tensor:
    """Return the largest change of a score to the next float32 number, by scale: ``(scales,)``."""
    up = torch.nextafter(scores.float(), torch.full_like(scores, torch.inf, dtype=torch.float32))
    return (_to_logits(up, signature) - _to_logits(scores, signature)).abs().amax(dim=1)


def _copy_with_zero_weights(module: nn.Module, inputs: Mapping[str, Tensor]) -> nn.Module:
    """Copy the network with zero weights for the inputs that will be removed.

    ``inputs`` has, by layer name, which inputs are kept: bool ``(inputs,)``.
    """
    copied = private_copy(module).eval()
    for name, is_kept in inputs.items():
        layer = copied.get_submodule(name)
        if isinstance(layer, nn.Linear):
            replace_parameter(layer, "weight", layer.weight.detach() * is_kept)
    return copied


def _narrow(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Keep only some outputs and inputs of a layer, or channels of a norm, in place.

    Args:
        module: a layer or norm of a private copy.
        outputs: which outputs are kept, bool ``(outputs,)``; None for all.
        inputs: which inputs (channels of a norm) are kept, bool ``(inputs,)``; None for all.
    """
    if isinstance(module, nn.Linear):
        weight = module.weight.detach()
        weight = weight if outputs is None else weight[outputs]
        weight = weight if inputs is None else weight[:, inputs]
        replace_parameter(module, "weight", weight.contiguous())
        if outputs is not None and module.bias is not None:
            replace_parameter(module, "bias", module.bias.detach()[outputs])
        module.out_features, module.in_features = weight.shape
        return
    if inputs is None:
        return
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dim() != 1:
            continue
        if isinstance(tensor, nn.Parameter):
            replace_parameter(module, name, tensor.detach()[inputs])
        else:
            setattr(module, name, tensor[inputs])
    size = "num_features" if isinstance(module, nn.BatchNorm1d) else "num_parameters"
    setattr(module, size, int(inputs.sum()))
