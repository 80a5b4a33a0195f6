"""Compress a random network step by step, lower it, and compare everything with torch.

What may come out is parity, or a refusal of ours with a name and a sentence. Anything else is a
``Fault``: a graph or module that computes something else, a broken contract, or a raw exception.

A difference over the limit is excused in one case only: where rounding explains it. The network is
scored in torch again with the result of every layer changed by the rounding of the arithmetic that
the target uses (2^-21 in float32, 2^-11 in float16, 2^-8 in bfloat16; signs at random); of weights
with an offset the sums that cancel count as well (``_offset_products``). If that
moves torch's own scores as far as the graph's are away (within a factor of 4), then no two correct
programs agree on this network, and the pair is counted as ill-conditioned. Rows whose numbers
float16 does not have, at a layer that TensorRT multiplies in float16, count as beyond float16.
"""

import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Bench, DenseInput, JaggedBag, Plan, Signature, Split, TargetKind
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.skipping import run_or_skip
from compressors.core.state.module_state import load
from compressors.core.units import Unit, private_copy
from compressors.errors.compression import CompressionError, ContractBroken, ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.audit import audit
from compressors.lower.bfloat16_products import has_bfloat16_products, write_checkable
from compressors.lower.export import lower
from compressors.lower.parity import compare
from compressors.lower.serving_wrapper import VECTOR, ServedGraph, input_names, served_graphs
from compressors.quantize.dense.weight_only import zero_code
from infra.onnxruntime.sessions import Session, optimized_graph
from tests.random_networks import inputs as row_makers
from tests.random_networks.generator import Case, rows_of
from tests.random_networks.inputs import Rows, allowed, some_rows
from tests.random_networks.reference import decoded_network

FloatArray = NDArray[np.float32]
NUDGES = {"float32": 2.0**-21, "float16": 2.0**-11, "bfloat16": 2.0**-8}
EXCUSED = 4
BENCH_ROWS = 64
RELOADED_EVERY = 5
FLOAT16_END = 65504.0
IN_FLOAT16 = ("weight_int8", "weight_int4", "float16")
PRESERVING = ("fold", "equalize", "smooth_quant")


@dataclass(frozen=True)
class Fault:
    """Something that must not happen, and where it did."""

    seed: int
    where: str
    kind: str
    sentence: str

    def line(self) -> str:
        """One line for a log."""
        return f"seed {self.seed} | {self.where} | {self.kind} | {self.sentence}"


@dataclass
class Findings:
    """What a run found: faults, refusals by name, and how much was compared."""

    faults: list[Fault] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    refused: list[Fault] = field(default_factory=list)
    pairs: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Findings") -> None:
        """Take in what another run found."""
        self.faults += other.faults
        self.refused += other.refused
        for name in ("refusals", "pairs", "counts"):
            getattr(self, name).update(getattr(other, name))


class Checker:
    """One network, and everything that is checked on it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.found = case, folder, Findings()
        self.source = case.model()
        self.tables = rows_of(self.source.module, case.signature)
        self.bench = write_bench(case, self.source.module, self.tables, folder / "bench")
        seed, signature, scales = case.seed, case.signature, case.scales
        self.rows: dict[str, Rows] = {
            "typical": row_makers.typical_rows(signature, self.tables, 48, scales, seed),
            "edge": row_makers.edge_rows(signature, self.tables, scales, seed),
            "extreme": row_makers.extreme_rows(signature, self.tables, scales, seed),
            "empty": row_makers.empty_rows(signature, self.tables, 2),
        }
        self.number = 0
        self.found.counts["networks"] += 1

    def guarded(self, where: str, work: Callable[[], Any]) -> Any:
        """The result of some work, or None with its refusal or fault written down."""
        try:
            return work()
        except (ParityLost, ContractBroken) as fault:
            self.fault(where, type(fault).__name__, str(fault))
        except CompressionError as refusal:
            if " got KeyError(" in str(refusal) or " got IndexError(" in str(refusal):
                self.fault(where, "raw exception", str(refusal))
            name = type(refusal).__name__
            self.found.refusals[f"{name}: {_pattern(str(refusal))}"] += 1
            self.found.refused.append(Fault(self.case.seed, where, name, str(refusal)))
        except AssertionError as wrong:
            self.fault(where, "wrong", str(wrong))
        except Exception as fault:
            where_raised = traceback.extract_tb(fault.__traceback__)[-1]
            self.fault(
                where,
                "raw exception",
                f"{type(fault).__name__}: {fault} ({Path(where_raised.filename).name}:"
                f"{where_raised.lineno})",
            )
        return None

    def fault(self, where: str, kind: str, sentence: str) -> None:
        """Write a fault down."""
        self.found.faults.append(Fault(self.case.seed, where, kind, sentence))

    def applied(self, step: Any, model: Model) -> Model | None:
        """The model after one step, as loaded from its stored state; None if it was refused."""
        self.number += 1
        folder = self.folder / f"step{self.number}"
        where = f"{step.kind} {getattr(step, 'tables', ()) or getattr(step, 'layers', ())}"
        result: Model | None = self.guarded(
            where, lambda: run_or_skip(step, model, self.bench, folder)
        )
        if result is not None:
            self.found.counts["steps"] += 1
            if self.number % RELOADED_EVERY == 0:  # run itself compares on usual rows
                self.guarded(f"{where} reload", lambda: self._reloads(result, folder))
            if step.kind in PRESERVING:
                self.guarded(where, lambda: self._preserves(step.kind, model.module, result.module))
        return result

    def _reloads(self, model: Model, folder: Path) -> None:
        again = load(model.architecture, model.network, folder)
        assert [(u.name, u.format) for u in Unit.of(again)] == [
            (u.name, u.format) for u in Unit.of(model.module)
        ], "a reloaded network has other units"
        rows = allowed(self.case.signature, self.tables, self.rows["edge"])[0]
        with torch.no_grad():
            first, second = model.module(**rows), again(**rows)
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0)), "a reload scores other"

    def _preserves(self, kind: str, before: nn.Module, after: nn.Module) -> None:
        for name in ("typical", "edge", "empty"):
            rows = allowed(self.case.signature, self.tables, self.rows[name])[0]
            self._alike(f"{kind} on {name} rows", before, after, rows, 2e-4)

    def module_checked(self, packed: Model, plain: Model, where: str) -> None:
        """Compare a compressed module with the plain one over decoded weights."""
        reference, faults = decoded_network(packed.module, plain.module)
        for sentence in faults:
            self.fault(where, "decoded", sentence)
        formats = {unit.format for unit in Unit.of(packed.module)}
        # Inputs on the edge between two levels fall to either side in another order of sums.
        rounding = formats & {"static_int8", "float8_dense", "weight_int8", "weight_int4"}
        share = 0.05 if rounding else 2e-4
        for name in ("typical", "edge", "extreme", "empty"):
            rows = allowed(self.case.signature, self.tables, self.rows[name])[0]
            what = f"{where} against decoded weights on {name} rows"
            self.guarded(
                what,
                lambda: self._alike(what, reference, packed.module, rows, share),  # noqa: B023
            )
        self.found.counts["modules"] += 1

    def _alike(
        self, what: str, first: nn.Module, second: nn.Module, rows: Rows, share: float
    ) -> None:
        with torch.no_grad():
            expected, found = first(**rows).reshape(-1), second(**rows).reshape(-1)
        assert torch.equal(expected.isnan(), found.isnan()), f"{what}: NaN in other places"
        typical = allowed(self.case.signature, self.tables, self.rows["typical"])[0]
        with torch.no_grad():
            spread = float(first(**typical).nan_to_num().std()) if len(expected) else 0.0
        gap = (expected - found).nan_to_num()
        limit = share * spread + 1e-5
        rms = float(gap.square().mean().sqrt()) if len(gap) else 0.0
        if rms > limit and not self.is_rounding(gap, first, rows, "float32", squash=False):
            raise AssertionError(f"{what}: off by {rms:.2g} (limit {limit:.2g})")

    def is_rounding(
        self, gap: Tensor, module: nn.Module, rows: Rows, precision: str, *, squash: bool
    ) -> bool:
        """Whether rounding in some precision moves a module's own scores about as far as a gap."""
        with torch.no_grad():
            scores = [module(**rows)]
            scores += [
                _rounded_often(module, NUDGES[precision], seed)(**rows) for seed in (3, 4, 5)
            ]
        scores = [torch.sigmoid(score) if squash else score for score in scores]
        moved = torch.stack([(x - scores[0]).nan_to_num() for x in scores[1:]])
        rms, largest = moved.square().mean().sqrt(), moved.abs().max()
        gap = gap.nan_to_num()
        excused = bool(
            gap.square().mean().sqrt() <= EXCUSED * rms and gap.abs().max() <= EXCUSED * largest
        )
        self.found.counts[f"ill-conditioned in {precision}"] += excused
        return excused

    def lowered(self, model: Model, target: TargetKind, where: str) -> None:
        """Lower every graph of a model for one target and compare it with the module."""
        for form in served_graphs(self.case.signature):
            what = f"{where} {form.name} on {target}"
            self.guarded(what, lambda: self._lowered(model, form, target, what))  # noqa: B023

    def _lowered(self, model: Model, form: ServedGraph, target: TargetKind, where: str) -> None:
        path = self.folder / f"{form.name}-{target}.onnx"
        lowered = lower(model.module, form, target, path)
        plan = plan_of_form(model, form)
        session = _session(path, target, plan)
        self.found.counts["graphs"] += 1
        self.found.pairs.update(
            f"{unit.format} on {target}" for unit in Unit.of(form.part(model.module))
        )
        scores: dict[str, FloatArray] = {}
        for name, rows in self.rows.items():
            mine = {key: rows[key] for key in input_names(form.signature)}
            expected = self.scored(model.module, form, mine)
            with torch.no_grad():
                served = lowered.served(*mine.values()).numpy()
            self._same(f"{where}: the policy in torch, {name} rows", expected, served)
            found = session.scores({key: x.numpy() for key, x in mine.items()})
            self.guarded(
                f"{where}, {name} rows",
                lambda: self._parity(served, found, plan, target, model, form, mine),  # noqa: B023
            )
            scores[name] = found
            self.found.counts["parities"] += 1
        mine = {key: self.rows["typical"][key] for key in input_names(form.signature)}
        for few in ([0], [1, 2]):
            rows = some_rows(form.signature, mine, few)
            alone = session.scores({key: x.numpy() for key, x in rows.items()})
            self._parity(scores["typical"][few], alone, plan, target, model, form, rows, few=True)
        if target == "onnxruntime":
            audit(optimized_graph(path), plan, lowered.tables, lowered.layers)
            self.found.counts["audits"] += 1

    def scored(self, module: nn.Module, form: ServedGraph, rows: Rows) -> FloatArray:
        """What torch says of rows, with the request policy of this package's own."""
        within, refused = allowed(form.signature, self.tables, rows)
        with torch.no_grad():
            score = form.part(module)(**within)
        if form.output != VECTOR:
            score = score.reshape(-1)
            score = torch.sigmoid(score) if form.signature.output == "logit" else score
        score = score.clone()
        score[refused] = torch.nan
        return score.numpy()

    def _same(self, what: str, expected: FloatArray, found: FloatArray) -> None:
        assert expected.shape == found.shape, f"{what}: {expected.shape} and {found.shape}"
        assert np.array_equal(np.isnan(expected), np.isnan(found)), (
            f"{what}: NaN in rows {np.flatnonzero(np.isnan(expected) != np.isnan(found))[:5]}"
        )
        limit = 1e-5 + 1e-4 * float(np.nan_to_num(expected).std()) if expected.size else 1.0
        gap = float(np.nanmax(np.abs(expected - found), initial=0.0))
        assert gap <= limit, f"{what}: off by {gap:.2g} (limit {limit:.2g})"

    def _parity(
        self,
        expected: FloatArray,
        found: FloatArray,
        plan: Plan | None,
        target: TargetKind,
        model: Model,
        form: ServedGraph,
        rows: Rows,
        *,
        few: bool = False,
    ) -> None:
        typical = {key: self.rows["typical"][key] for key in input_names(form.signature)}
        usual = self.scored(model.module, form, typical)
        try:
            if few or not _spread(expected) > 0.1 * _spread(usual):
                # Rows alike have no spread of their own: judged by that of typical rows.
                usual = usual[~np.isnan(usual)].reshape(-1)
                limits = compare(usual, usual, plan, target)
                gap = float(np.nanmax(np.abs(expected - found), initial=0.0))
                nan = np.array_equal(np.isnan(expected), np.isnan(found))
                if expected.shape != found.shape or not nan or gap > limits.largest_limit:
                    raise ParityLost(
                        ParityFailure(
                            code="parity_limit",
                            target=target,
                            measured={"at most": gap},
                            limits={"at most": limits.largest_limit},
                        )
                    )
            else:
                compare(expected, found, plan, target)
        except ParityLost:
            within = allowed(form.signature, self.tables, rows)[0]
            part = form.part(model.module)
            if target != "onnxruntime" and _beyond_float16(part, within):
                self.found.counts["beyond float16"] += 1
                return
            nan = np.isnan(expected)
            if expected.shape != found.shape or not np.array_equal(nan, np.isnan(found)):
                raise
            formats = {unit.format for unit in Unit.of(form.part(model.module))}
            precision = "float32"
            if target != "onnxruntime" and formats - {"float32"}:
                precision = "bfloat16" if has_bfloat16_products(plan) else "float16"
            gap_tensor = torch.from_numpy(expected - found)
            squash = form.output != VECTOR and form.signature.output == "logit"
            if not self.is_rounding(gap_tensor, part, within, precision, squash=squash):
                raise


def _spread(scores: FloatArray) -> float:
    known = scores[~np.isnan(scores)]
    return float(known.std()) if known.size else 0.0


def _beyond_float16(module: nn.Module, rows: Rows) -> bool:
    """Whether a layer that TensorRT multiplies in float16 meets numbers that float16 lacks."""
    beyond: list[bool] = []

    def look(layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        beyond.append(max(float(given[0].abs().max()), float(result.abs().max())) > FLOAT16_END)

    copied = private_copy(module).eval()
    for layer in copied.modules():
        if isinstance(layer, PackedLinear) and layer.storage.name in IN_FLOAT16:
            layer.register_forward_hook(look)
    with torch.no_grad():
        copied(**rows)
    return any(beyond)


def _rounded_often(module: nn.Module, size: float, seed: int) -> nn.Module:
    """A copy of a module in which the result of every layer is changed by a little."""
    generator = torch.Generator().manual_seed(seed)

    def change(layer: nn.Module, given: Any, result: Any) -> Any:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        sign = torch.randint(0, 2, result.shape, generator=generator) * 2 - 1
        largest = result.abs()
        if isinstance(layer, PackedLinear) and layer.settings.get("activations") == "int8":
            largest = largest + _offset_products(layer, given[0])
        return result + size * sign.to(result.dtype) * largest

    copied = private_copy(module).eval()
    for layer in copied.modules():
        layer.register_forward_hook(change)
    return copied


def _offset_products(layer: PackedLinear, x: Tensor) -> Tensor:
    """What ONNX Runtime adds and takes off again in a layer with unsigned weights and int8 inputs.

    Its codes have an offset of half their range: products of the inputs with that offset are summed
    in float32 and subtracted, also where a weight is 0.
    """
    offset = zero_code(8 if layer.storage.name == "weight_int8" else 4)
    scale = layer.get_buffer("scale").float().amax(dim=1)  # (out,)
    return x.abs().sum(dim=-1, keepdim=True) * offset * scale


def _pattern(sentence: str) -> str:
    """The beginning of a sentence without names and numbers, to count refusals by."""
    words = [
        "#" if any(c.isdigit() or c in "'\"_[]" for c in word) else word
        for word in sentence.split()
    ]
    return " ".join(words[:14])


def _session(path: Path, target: TargetKind, plan: Plan | None) -> Session:
    if target == "onnxruntime" or not has_bfloat16_products(plan):
        return Session(path, 1)
    checkable = path.with_name(f"checkable-{path.name}")
    write_checkable(path, checkable)
    return Session(checkable, 1)


def plan_of_form(model: Model, form: ServedGraph) -> Plan | None:
    """The lines of a plan about the units that a graph runs."""
    if model.plan is None or not form.module:
        return model.plan
    mine = set(form.part(model.module).modules())
    names = {unit.name for unit in Unit.of(model.module) if unit.module in mine}
    return Plan(lines=tuple(line for line in model.plan.lines if line.module in names))


def write_bench(case: Case, module: nn.Module, tables: dict[str, int], folder: Path) -> Bench:
    """A bench of typical rows, as prepared data is stored, with labels that can be learned."""
    parts: dict[str, Split] = {}
    for seed, name in enumerate(("calibration", "train", "validation"), 70):
        rows = row_makers.typical_rows(case.signature, tables, BENCH_ROWS, case.scales, seed)
        with torch.no_grad():
            score = module(**rows).reshape(-1).nan_to_num()
        if name == "train":
            parts["soft_labels"] = _split(folder / "soft_labels", {"score": score})
        # Mostly what the network says, with every fifth row the other way: something to learn.
        label = ((score > score.median()) ^ (torch.arange(BENCH_ROWS) % 5 == 0)).float()
        parts[name] = _split(folder / name, {**_stored(case.signature, rows), "@label": label})
    return Bench(signature=case.signature, **parts)


def _stored(signature: Signature, rows: Rows) -> dict[str, Tensor]:
    held = {}
    for item in signature.inputs:
        held[item.name] = rows[item.name]
        if isinstance(item, JaggedBag) and not isinstance(item, DenseInput):
            lengths = torch.tensor([len(ids) for ids in row_makers.unpacked(item, rows)])
            held[f"@bounds/{item.name}"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if signature.group is not None:
        held["@group"] = torch.arange(BENCH_ROWS) // 8
    return held


def _split(folder: Path, tensors: dict[str, Tensor]) -> Split:
    folder.mkdir(parents=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "data.safetensors")
    return Split(path=str(folder), sha256="0" * 64, rows=BENCH_ROWS)


def checked(case: Case, work: Callable[[Checker], None]) -> Findings:
    """What some work on one case finds."""
    with tempfile.TemporaryDirectory(prefix="network-") as scratch:
        checker = Checker(case, Path(scratch))
        work(checker)
        return checker.found


def units_of(model: Model) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the float tables and layers of a model that are stored alone."""
    units = Unit.of(model.module)
    tables = [u.name for u in units if u.role == "table" and u.format == "float32"]
    layers = [u.name for u in units if u.role == "dense" and u.format == "float32"]
    return tables, layers
