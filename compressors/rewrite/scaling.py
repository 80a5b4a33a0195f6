"""Move channel factors from a layer or norm into its consumers without changing the predictions.

With a factor ``s > 0`` for each channel, the weights of a layer or norm (the *producer*) are
divided by ``s``, so that it outputs ``y / s``, and the weights of its consumers are multiplied by
``s``. A Relu or a similar operator between them does not matter, because ``f(y / s) = f(y) / s``.
A *link* is a producer with all its consumers.
``equalize.py`` and ``smooth_quant.py`` use this module.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.steps.decisions import Decision, StepPlan, choose_dense
from compressors.core.units import Unit, replace_parameter
from compressors.rewrite.dataflow import dataflow

Norm = nn.LayerNorm | nn.RMSNorm | nn.BatchNorm1d


@dataclass(frozen=True)
class Link:
    """A layer or norm (``producer``) and all consumers of its output, which are Linear layers."""

    producer: str
    consumers: tuple[str, ...]


def choose_links(
    model: Model, signature: Signature, patterns: tuple[str, ...], kind: str, *, norms: bool
) -> StepPlan[tuple[Link, ...]]:
    """Select the links along which factors can move; give a reason for each other dense layer.

    Args:
        model: the network; it is not changed.
        signature: describes its inputs.
        patterns: patterns of the names of layers that may change.
        kind: the kind of the calling step.
        norms: whether factors also move from norms with an affine part into their consumers.

    Raises:
        NothingToCompress: a pattern matches no layer.
        StepRefused: the network cannot be exported.
    """
    decisions = choose_dense(Unit.of(model.module), patterns, kind)
    flow = dataflow(model.module, signature)
    links: list[Link] = []
    scaled: dict[str, list[Reason]] = {}
    reasons: dict[str, Reason] = {**flow.reasons}
    for producer, consumers in flow.consumers.items():
        names = tuple(dict.fromkeys(consumer.name for consumer in consumers))
        why = _explain_not_scalable(
            model.module, producer, names, decisions, flow.input_dims, norms=norms
        )
        if why is not None:
            reasons[producer] = why
            continue
        links.append(Link(producer, names))
        for name in names:
            inputs = Reason("inputs_scaled", step=kind, producer=producer)
            scaled.setdefault(name, []).append(inputs)
        if producer in decisions:
            outputs = Reason("outputs_scaled", step=kind, consumers=names)
            scaled.setdefault(producer, []).append(outputs)
    for name, decision in decisions.items():
        if not decision.selected:
            continue
        if name in scaled:
            decisions[name] = Decision("taken", tuple(scaled[name]))
        else:
            default = Reason("not_scalable")
            decisions[name] = Decision("skipped", (reasons.get(name, default),))
    return StepPlan(decisions, tuple(links))


def _explain_not_scalable(
    module: nn.Module,
    producer: str,
    consumers: Collection[str],
    decisions: Mapping[str, Decision],
    dims: Mapping[str, int],
    *,
    norms: bool,
) -> Reason | None:
    """Return why no factor can move from a producer into its consumers; None if one can."""
    producing_module = module.get_submodule(producer)
    if not consumers:
        return Reason("output_unread")
    if isinstance(producing_module, Norm):
        if not norms:
            return Reason("is_norm", norm=producer)
        if producing_module.weight is None or producing_module.weight.dim() != 1:
            return Reason("norm_without_channel_affine", norm=producer)
        if isinstance(producing_module, nn.BatchNorm1d) and dims[producer] != 2:
            # Its input is (rows, channels, positions): channels are not the last dimension.
            return Reason("norm_of_places", norm=producer)
    elif not isinstance(producing_module, nn.Linear):
        return Reason("not_linear_or_norm", module=producer)
    for name in (producer, *consumers):
        if name == producer and not isinstance(producing_module, nn.Linear):
            continue
        if name not in decisions:
            if isinstance(module.get_submodule(name), Norm):
                return Reason("consumer_is_norm", consumer=name)
            return Reason("consumer_not_linear", consumer=name)
        if not decisions[name].selected:
            return Reason("layer_fixed", layer=name, why=decisions[name].reasons)
    return None


def rescale(module: nn.Module, link: Link, factors: Tensor) -> None:
    """Divide a producer's outputs by factors, and multiply its consumers' weights, in place.

    Args:
        module: a copy of the network; it may share tensors, which are replaced, not changed.
        link: the producer and its consumers.
        factors: float64 ``(channels,)``, positive.
    """
    producing_module = module.get_submodule(link.producer)
    for name, tensor in list(producing_module.named_parameters(recurse=False)):
        if name not in ("weight", "bias"):
            continue
        divisor = factors if tensor.dim() == 1 else factors[:, None]
        replace_parameter(
            producing_module, name, (tensor.detach().double() / divisor).to(tensor.dtype)
        )
    for name in link.consumers:
        layer = module.get_submodule(name)
        weight = linear_weight(layer)
        replace_parameter(layer, "weight", (weight.double() * factors).to(weight.dtype))


def linear_weight(layer: nn.Module) -> Tensor:
    """Return the detached weight of a Linear: float ``(out, in)``.

    Raises:
        TypeError: the layer is not a Linear.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"Expected a Linear, got a {type(layer).__name__}.")
    return layer.weight.detach()
