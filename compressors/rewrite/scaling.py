"""Factors that move from one layer into the next, and leave what the network computes as it is.

With a factor ``s > 0`` for each channel between them, a layer or norm gives ``y / s`` and those who
read it take ``s`` times each input: through a Relu and the like, ``f(y / s) = f(y) / s``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.core.model import Model
from compressors.core.units import Choice, Unit, choose_dense, own_weight
from compressors.rewrite.dataflow import dataflow

Norm = nn.LayerNorm | nn.RMSNorm | nn.BatchNorm1d


@dataclass(frozen=True)
class Link:
    """A layer or norm, and all the Linear layers that read its output."""

    maker: str
    readers: tuple[str, ...]


def choose_links(
    model: Model, signature: Signature, patterns: tuple[str, ...], kind: str, *, norms: bool
) -> tuple[list[Link], dict[str, Choice]]:
    """Between which layers factors can move, and what is told of every dense layer.

    Args:
        model: left as it is.
        signature: of its inputs.
        patterns: of the names of layers that may change.
        kind: the step's tag.
        norms: also from norms with an affine part into the layers that read them.

    Raises:
        CompressionError: the network cannot be exported.
    """
    choices = choose_dense(Unit.of(model.module), patterns, kind)
    found = dataflow(model.module, signature)
    links: list[Link] = []
    words: dict[str, list[str]] = {}
    reasons: dict[str, str] = {**found.reasons}
    for maker, readers in found.readers.items():
        names = tuple(dict.fromkeys(reader.name for reader in readers))
        why = _why_not(model.module, maker, names, choices, found.dims, norms=norms)
        if why is not None:
            reasons[maker] = why
            continue
        links.append(Link(maker, names))
        for name in names:
            words.setdefault(name, []).append(f"inputs scaled with {maker}")
        if maker in choices:
            words.setdefault(maker, []).append(f"outputs scaled for {', '.join(names)}")
    for name, choice in choices.items():
        if not choice.take:
            continue
        if name in words:
            choices[name] = replace(choice, reason=f"{kind}: {', '.join(words[name])}")
        else:
            default = "nothing that a factor passes feeds it"
            choices[name] = Choice(False, reasons.get(name, default))
    return links, choices


def _why_not(
    module: nn.Module,
    maker: str,
    readers: Collection[str],
    choices: Mapping[str, Choice],
    dims: Mapping[str, int],
    *,
    norms: bool,
) -> str | None:
    """Why no factor can move from a layer or norm into those who read it."""
    made = module.get_submodule(maker)
    if not readers:
        return "nothing reads it"
    if isinstance(made, Norm):
        if not norms:
            return f"{maker} is a norm: fold it first"
        if made.weight is None or made.weight.dim() != 1:
            return f"{maker} has no affine part for each channel"
        if isinstance(made, nn.BatchNorm1d) and dims[maker] != 2:
            return f"{maker} normalises (rows, channels, places)"
    elif not isinstance(made, nn.Linear):
        return f"{maker} is no Linear and no norm"
    for name in (maker, *readers):
        if name == maker and not isinstance(made, nn.Linear):
            continue
        if name not in choices:
            norm = isinstance(module.get_submodule(name), Norm)
            return f"{name}, which reads it, is {'a norm: fold it first' if norm else 'no Linear'}"
        if not choices[name].take:
            return f"{name}: {choices[name].reason}"
    return None


def rescale(module: nn.Module, link: Link, scale: Tensor) -> None:
    """Divide a maker's outputs by ``scale``, float64 ``(channels,)``, and multiply its readers'.

    ``module`` is of a private tree.
    """
    maker = module.get_submodule(link.maker)
    for name, tensor in list(maker.named_parameters(recurse=False)):
        if name not in ("weight", "bias"):
            continue
        by = scale if tensor.dim() == 1 else scale[:, None]
        own_weight(maker, name, (tensor.detach().double() / by).to(tensor.dtype))
    for name in link.readers:
        layer = module.get_submodule(name)
        weight = linear_weight(layer)
        own_weight(layer, "weight", (weight.double() * scale).to(weight.dtype))


def linear_weight(layer: nn.Module) -> Tensor:
    """The weight of a Linear: float ``(out, in)``."""
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"a Linear was expected, and this is a {type(layer).__name__}")
    return layer.weight.detach()
