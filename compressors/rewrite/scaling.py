"""Move channel factors from a layer or norm into its consumers without changing the predictions.

With a factor ``s > 0`` for each channel, a layer or norm (the *maker*) outputs ``y / s``, and its
consumers (the *readers*) multiply each input by ``s``. A Relu or a similar operator between them
does not matter, because ``f(y / s) = f(y) / s``. ``equalize.py`` and ``smooth_quant.py`` use this
module.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.steps.decisions import Decision, StepPlan, choose_dense
from compressors.core.units import Unit, own_weight
from compressors.rewrite.dataflow import dataflow

Norm = nn.LayerNorm | nn.RMSNorm | nn.BatchNorm1d


@dataclass(frozen=True)
class Link:
    """A layer or norm (``maker``) and all Linear layers that consume its output (``readers``)."""

    maker: str
    readers: tuple[str, ...]


def choose_links(
    model: Model, signature: Signature, patterns: tuple[str, ...], kind: str, *, norms: bool
) -> StepPlan[tuple[Link, ...]]:
    """Select the links along which factors can move; give a reason for each other dense layer.

    Args:
        model: the network; it is not changed.
        signature: its inputs.
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
    for maker, readers in flow.readers.items():
        names = tuple(dict.fromkeys(reader.name for reader in readers))
        why = _reason_not_scalable(model.module, maker, names, decisions, flow.dims, norms=norms)
        if why is not None:
            reasons[maker] = why
            continue
        links.append(Link(maker, names))
        for name in names:
            inputs = Reason("inputs_scaled", step=kind, maker=maker)
            scaled.setdefault(name, []).append(inputs)
        if maker in decisions:
            outputs = Reason("outputs_scaled", step=kind, readers=names)
            scaled.setdefault(maker, []).append(outputs)
    for name, decision in decisions.items():
        if not decision.selected:
            continue
        if name in scaled:
            decisions[name] = Decision("taken", tuple(scaled[name]))
        else:
            default = Reason("not_scalable")
            decisions[name] = Decision("skipped", (reasons.get(name, default),))
    return StepPlan(decisions, tuple(links))


def _reason_not_scalable(
    module: nn.Module,
    maker: str,
    readers: Collection[str],
    decisions: Mapping[str, Decision],
    dims: Mapping[str, int],
    *,
    norms: bool,
) -> Reason | None:
    """The reason why no factor can move from a maker into its readers; None if one can."""
    producer = module.get_submodule(maker)
    if not readers:
        return Reason("output_unread")
    if isinstance(producer, Norm):
        if not norms:
            return Reason("is_norm", norm=maker)
        if producer.weight is None or producer.weight.dim() != 1:
            return Reason("norm_without_channel_affine", norm=maker)
        if isinstance(producer, nn.BatchNorm1d) and dims[maker] != 2:
            return Reason("norm_of_places", norm=maker)
    elif not isinstance(producer, nn.Linear):
        return Reason("not_linear_or_norm", module=maker)
    for name in (maker, *readers):
        if name == maker and not isinstance(producer, nn.Linear):
            continue
        if name not in decisions:
            if isinstance(module.get_submodule(name), Norm):
                return Reason("reader_is_norm", reader=name)
            return Reason("reader_not_linear", reader=name)
        if not decisions[name].selected:
            return Reason("layer_not_free", layer=name, why=decisions[name].reasons)
    return None


def rescale(module: nn.Module, link: Link, scale: Tensor) -> None:
    """Divide the maker's outputs by ``scale`` and multiply the readers' weights by it, in place.

    Args:
        module: a private copy of the network.
        link: the maker and its readers.
        scale: float64 ``(channels,)``, positive.
    """
    maker = module.get_submodule(link.maker)
    for name, tensor in list(maker.named_parameters(recurse=False)):
        if name not in ("weight", "bias"):
            continue
        divisor = scale if tensor.dim() == 1 else scale[:, None]
        own_weight(maker, name, (tensor.detach().double() / divisor).to(tensor.dtype))
    for name in link.readers:
        layer = module.get_submodule(name)
        weight = linear_weight(layer)
        own_weight(layer, "weight", (weight.double() * scale).to(weight.dtype))


def linear_weight(layer: nn.Module) -> Tensor:
    """The detached weight of a Linear: float ``(out, in)``.

    Raises:
        TypeError: the layer is not a Linear.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"Expected a Linear, got a {type(layer).__name__}.")
    return layer.weight.detach()
