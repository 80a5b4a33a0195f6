"""Fold norms into adjacent dense layers and remove dead channels.

The network computes the same values, up to float32 rounding, with fewer operators. Run this step
before steps that compress dense layers: it changes only float32 layers, and the later steps then
process the weights that are served. Tables may be compressed before or after it.

* A batch norm in evaluation mode multiplies each channel by a factor (``scale``) and adds an offset
  (``shift``). If it directly follows or precedes a Linear, with no nonlinear operator between them,
  factors and offsets become part of the Linear's weight and bias, and ``FoldedNorm`` (an identity)
  replaces the norm. Otherwise the norm stays in the served graph, in float32; between two int8
  layers, the runtime then converts to float32 and back.
* The affine part of a LayerNorm or RMSNorm moves into the layers that consume the norm's output, if
  all of them are Linears.
* Dead channels, whose output is constant or unused (``dead_channels.py``), are removed; their
  constant is added to the biases of the layers that consumed them.
* A column of a table or dense input to which only zero weights are applied is reported, not removed
  (``unread_features.py``).

A module is *fixed* if its weights must not change, for example because other code reads them
(``dataflow.py``).

Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2 (fold a batch norm into the
layer before it).
Differs: norms are folded only for evaluation, and also into the layers after the norm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part, Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import FoldedNorm
from compressors.core.placeholders import is_placeholder
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, private_copy, replace_parameter, swap
from compressors.errors.steps import StepRefused
from compressors.prune.structure.narrowing import score_difference
from compressors.rewrite.dataflow import Consumer, Dataflow, dataflow
from compressors.rewrite.dead_channels import DeadChannels, find_dead_channels, remove_dead_channels
from compressors.rewrite.unread_features import unread_features

AffineNorm = nn.LayerNorm | nn.RMSNorm


def scale_outputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that include ``y * scale + shift`` after a Linear, in float64.

    ``weight`` is ``(out, in)``; ``bias``, ``scale`` and ``shift`` are ``(out,)``.
    """
    old_bias = torch.zeros_like(shift) if bias is None else bias.double()
    return weight.double() * scale[:, None], old_bias * scale + shift


def scale_inputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that include ``x * scale + shift`` before a Linear, in float64.

    ``weight`` is ``(out, in)``, ``bias`` ``(out,)``; ``scale`` and ``shift`` are ``(in,)``.
    """
    offset = weight.double() @ shift
    return weight.double() * scale, offset if bias is None else bias.double() + offset


def batch_norm_factors(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return factor and offset of a batch norm in evaluation mode: float64 ``(channels,)`` each.

    Raises:
        StepRefused: the norm has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise StepRefused("norm_without_statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def affine_factors(norm: AffineNorm) -> tuple[Tensor, Tensor]:
    """Return factor and offset of a LayerNorm or RMSNorm: float64 ``(channels,)`` each."""
    scale = norm.weight.detach().double()
    bias = getattr(norm, "bias", None)
    return scale, torch.zeros_like(scale) if bias is None else bias.detach().double()


@dataclass(frozen=True)
class NormFold:
    """One norm and the layers that it is folded into.

    Attributes:
        norm: name of the norm.
        layers: names of the dense layers: the one before the norm, or all that consume its output.
        norm_is_first: whether the norm precedes the layers.
    """

    norm: str
    layers: tuple[str, ...]
    norm_is_first: bool


class Folding(NamedTuple):
    """The data that ``Fold.plan`` passes to ``Fold.apply``.

    Attributes:
        signature: the signature of the network, from which random inputs are generated.
        norm_folds: the norms to fold.
        dead_channels: the channels that are dead after folding, as the values of the weights prove.
        changeable_layers: names of the dense layers that may change.
    """

    signature: Signature
    norm_folds: tuple[NormFold, ...]
    dead_channels: tuple[DeadChannels, ...]
    changeable_layers: frozenset[str]


class Fold(StepSettings):
    """Fold norms into the dense layers around them, and remove dead channels."""

    effect: ClassVar[Effect] = "values"  # layers keep their format; weights and widths change

    kind: Literal["fold"] = "fold"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers that may change: module names, with * for any characters."
    )
    rows: int = Field(
        0,
        ge=0,
        description="Calibration rows to read; channels that are constant on them count as dead. "
        "0: only channels that the weights prove dead, which changes no score.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows, if they are used to find dead channels."""
        return ("calibration",) if self.rows else ()

    def plan(self, model: Model, bench: Bench) -> StepPlan[Folding]:
        """Select the layers that a norm is folded into or that lose channels, with reasons.

        Raises:
            NothingToCompress: a pattern matches no layer.
            StepRefused: the network cannot be exported.
        """
        norm_folds, decisions, kept_norms = self._find_norm_folds(model, bench)
        reasons: dict[str, list[Reason]] = {}
        for norm_fold in norm_folds:
            for layer in norm_fold.layers:
                folded_norm = Reason("norm_folded", step=self.kind, norm=norm_fold.norm)
                reasons.setdefault(layer, []).append(folded_norm)
        changeable = frozenset(name for name, decision in decisions.items() if decision.selected)
        folded = _fold_norms(replace(model, module=private_copy(model.module)), norm_folds)
        proven: tuple[DeadChannels, ...] = ()
        if not _has_placeholders(model):
            proven = find_dead_channels(folded, bench.signature, changeable, None)
        for dead in proven:
            for name, change in dead.reasons(self.kind).items():
                reasons.setdefault(name, []).append(change)
        result = {}
        sizes = {unit.name: unit.bytes for unit in Unit.of(model.module)}
        for name, decision in decisions.items():
            if decision.selected and name in reasons:
                result[name] = Decision("taken", tuple(reasons[name]))
            elif decision.selected and self.rows:
                constant = Reason("constant_channels", step=self.kind, rows=self.rows)
                # Only ``apply`` finds constant channels; until then, the bytes are in (0, size).
                result[name] = Decision("deferred", (constant,), (0, sizes[name]))
            elif decision.selected:
                result[name] = Decision(
                    "skipped", (kept_norms.get(name, Reason("nothing_to_fold")),)
                )
            else:
                result[name] = decision
        folding = Folding(bench.signature, tuple(norm_folds), proven, changeable)
        return StepPlan(result, folding)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Folding]) -> AppliedStep:
        """Fold norms, remove dead channels, and check that the predictions do not change.

        Raises:
            StepRefused: predictions change by more than rounding, because other code reads the
                layers' weights or channels directly.
        """
        after = self._fold_without_dead_channels(model, plan.payload)
        outcomes = _report_unread(after, bench.signature)
        if self.rows and bench.calibration is not None:
            sample = bench.calibration, self.rows
            dead = find_dead_channels(
                after, bench.signature, plan.payload.changeable_layers, sample
            )
            after = remove_dead_channels(after, bench.signature, dead)
        return AppliedStep(after, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[Folding]) -> Model:
        """Predict the result's shapes; channels constant only on calibration rows are kept."""
        return self._fold_without_dead_channels(model, plan.payload)

    def _fold_without_dead_channels(self, model: Model, folding: Folding) -> Model:
        """Fold the norms and remove the channels whose weights prove that they are dead.

        Raises:
            StepRefused: predictions change by more than rounding.
        """
        signature, norm_folds, dead, _ = folding
        before = replace(model, module=private_copy(model.module))
        after = _fold_norms(model, norm_folds)
        after = remove_dead_channels(after, signature, dead)
        gap = score_difference(after.module, before.module, signature)
        if gap is not None:
            raise StepRefused("folded_scores_differ", gap=gap)
        return after

    def _find_norm_folds(
        self, model: Model, bench: Bench
    ) -> tuple[list[NormFold], dict[str, Decision], dict[str, Reason]]:
        """Find the norms to fold.

        Returns:
            The norms to fold; the decision for each dense layer, whether it may change; and for
            each dense layer next to a norm that stays, why the norm stays.
        """
        decisions = choose_dense(Unit.of(model.module), self.layers, self.kind)
        flow = dataflow(model.module, bench.signature)
        for name, why in flow.fixed_reasons.items():
            if name in decisions and decisions[name].selected:
                decisions[name] = Decision("skipped", (why,))
        norm_folds: list[NormFold] = []
        kept_norms: dict[str, Reason] = {}
        for name, norm in model.module.named_modules():
            if isinstance(norm, nn.BatchNorm1d | AffineNorm) and name in flow.fixed_reasons:
                fixed = Reason("consumer_fixed", consumer=name, why=flow.fixed_reasons[name])
                kept_norms |= {n: fixed for n in decisions if flow.reasons.get(n) == fixed}
            elif isinstance(norm, nn.BatchNorm1d | AffineNorm):
                plan_norm_fold = (
                    _plan_batch_norm if isinstance(norm, nn.BatchNorm1d) else _plan_affine_part
                )
                result = plan_norm_fold(model.module, name, flow, decisions)
                if isinstance(result, NormFold):
                    norm_folds.append(result)
                else:
                    neighbors = [
                        n for n in decisions if Consumer(name) in flow.consumers.get(n, ())
                    ]
                    neighbors += [consumer.name for consumer in flow.consumers.get(name, ())]
                    kept_norms.update(dict.fromkeys(neighbors, result))
        return norm_folds, decisions, kept_norms


def _plan_batch_norm(
    module: nn.Module, name: str, flow: Dataflow, decisions: Mapping[str, Decision]
) -> NormFold | Reason:
    """Find the layers that a batch norm can be folded into, or the reason why it stays."""
    norm = module.get_submodule(name)
    if not isinstance(norm, nn.BatchNorm1d) or norm.running_var is None:
        return Reason("norm_without_statistics", norm=name)
    if flow.input_dims.get(name) != 2:
        # Its input is (rows, channels, positions), but the channels of a Linear are the last
        # dimension.
        return Reason("norm_of_places", norm=name)
    _, shift = batch_norm_factors(norm)
    before = flow.find_exclusive_producer(name)
    needs_bias = bool(shift.any())
    why = _explain_not_foldable(module, before, decisions, bias=needs_bias) if before else None
    if before is not None and why is None:
        return NormFold(name, (before,), norm_is_first=False)
    consumers = flow.direct_consumers(name)
    for layer in consumers:
        bias = not _is_unaffected_by_offset(module, layer, shift)
        why = _explain_not_foldable(module, layer, decisions, bias=bias)
        if why is not None:
            break
    if consumers and why is None:
        return NormFold(name, consumers, norm_is_first=True)
    return Reason("norm_kept", norm=name, why=why or Reason("no_single_neighbor"))


def _plan_affine_part(
    module: nn.Module, name: str, flow: Dataflow, decisions: Mapping[str, Decision]
) -> NormFold | Reason:
    """Find the layers that a norm's affine part can move into, or the reason why it stays."""
    norm = module.get_submodule(name)
    if not isinstance(norm, AffineNorm) or norm.weight is None:
        return Reason("norm_without_affine", norm=name)
    if norm.weight.dim() != 1:
        # It normalizes over several dimensions and has a factor for each of their entries, but a
        # Linear has one weight per channel (the last dimension).
        return Reason("norm_of_more", norm=name)
    scale, shift = affine_factors(norm)
    if bool((scale == 1).all()) and not bool(shift.any()):
        return Reason("norm_already_folded", norm=name)
    consumers = flow.direct_consumers(name)
    if not consumers:
        why = flow.reasons.get(name, Reason("nonlinear_output"))
        return Reason("norm_kept", norm=name, why=why)
    for layer in consumers:
        bias = not _is_unaffected_by_offset(module, layer, shift)
        if (reason := _explain_not_foldable(module, layer, decisions, bias=bias)) is not None:
            return Reason("norm_kept", norm=name, why=reason)
    return NormFold(name, consumers, norm_is_first=True)


def _is_unaffected_by_offset(module: nn.Module, layer: str, shift: Tensor) -> bool:
    """Whether an offset of a layer's inputs, float64 ``(in,)``, adds nothing to its output."""
    part = module.get_submodule(layer)
    if not isinstance(part, nn.Linear):
        return False
    return not bool((part.weight.detach().double() @ shift).any())


def _explain_not_foldable(
    module: nn.Module, layer: str, decisions: Mapping[str, Decision], *, bias: bool
) -> Reason | None:
    """Return the reason why a norm cannot be folded into a layer; None if it can.

    ``bias`` says whether the layer needs a bias, to which the offset of the norm is added.
    """
    part = module.get_submodule(layer)
    if not isinstance(part, nn.Linear):
        return Reason("not_float_linear", layer=layer)
    if not decisions[layer].selected:
        return Reason("layer_fixed", layer=layer, why=decisions[layer].reasons)
    if bias and part.bias is None:
        return Reason("no_bias_for_offset", layer=layer)
    return None


def _fold_norms(model: Model, norm_folds: Sequence[NormFold]) -> Model:
    """Fold norms into layers in place; the model is a private copy.

    ``replace_parameter`` gives a layer a new parameter: the caller's model shares the old one.
    """
    for norm_fold in norm_folds:
        norm = model.module.get_submodule(norm_fold.norm)
        scale, shift = _compute_factor_and_offset(norm)
        for name in norm_fold.layers:
            layer = model.module.get_submodule(name)
            if isinstance(layer, nn.Linear):
                scaled = scale_inputs if norm_fold.norm_is_first else scale_outputs
                weight, bias = scaled(layer.weight.detach(), _get_bias(layer), scale, shift)
                replace_parameter(layer, "weight", weight.to(layer.weight.dtype))
                if layer.bias is not None:
                    replace_parameter(layer, "bias", bias.to(layer.bias.dtype))
        if isinstance(norm, nn.BatchNorm1d):
            swap(model.module, norm_fold.norm, FoldedNorm())
            continue
        # A LayerNorm or RMSNorm stays; its affine part becomes the identity.
        for name, tensor in list(norm.named_parameters(recurse=False)):
            identity = torch.ones_like(tensor) if name == "weight" else torch.zeros_like(tensor)
            replace_parameter(norm, name, identity)
    return model


def _report_unread(model: Model, signature: Signature) -> dict[str, Decision]:
    """Report columns of tables and dense inputs whose weights are all zero, by unit name.

    Dense inputs are not units, so their columns are reported for the first dense layer.
    """
    reasons: dict[str, tuple[Reason, ...]] = {}
    units = Unit.of(model.module)
    first = next((unit.name for unit in units if unit.role == "dense"), None)
    for name, columns in unread_features(model.module, signature).items():
        if name in {unit.name for unit in units}:
            reasons[name] = (Reason("columns_unread", columns=columns),)
        elif first is not None:
            unread = Reason("input_columns_unread", columns=columns, input=name)
            reasons[first] = (*reasons.get(first, ()), unread)
    # "deferred": whether a unit changed is decided after the step by comparing its tensors.
    return {name: Decision("deferred", why) for name, why in reasons.items()}


def _compute_factor_and_offset(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return factor and offset of a norm of any kind: float64 ``(channels,)`` each.

    Raises:
        StepRefused: the module is no norm that can be folded.
    """
    if isinstance(norm, nn.BatchNorm1d):
        return batch_norm_factors(norm)
    if isinstance(norm, AffineNorm):
        return affine_factors(norm)
    raise StepRefused("norm_not_foldable", kind=type(norm).__name__)


def _get_bias(layer: nn.Linear) -> Tensor | None:
    """Return a layer's detached bias, or None if it has none."""
    return None if layer.bias is None else layer.bias.detach()


def _has_placeholders(model: Model) -> bool:
    """Whether weights are placeholders: they are all zero, so every channel would look dead."""
    return any(
        is_placeholder(part.weight)
        for part in model.module.modules()
        if isinstance(part, nn.Linear)
    )
