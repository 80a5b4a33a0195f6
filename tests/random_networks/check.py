"""Compress a random network step by step, lower it, and compare every result with torch.

A correct result is parity (scores equal to torch's within the limits of
``compressors/lower/comparison/parity.py``), or a refusal by one of recpress's error classes.
Anything else is a ``Fault``: a graph or module with other outputs, a step that violates the
requirements of all steps (``ContractBroken``), or an unexpected exception.

A difference over the limit is excused only if rounding explains it. For this test torch evaluates
the network again while the output of every layer is perturbed by the rounding error of the target's
arithmetic (2^-21 in float32, 2^-11 in float16, 2^-8 in bfloat16; random signs). For weights with an
offset, the sums that cancel are included (``compressors/lower/comparison/rounding_errors.py``). If
this perturbation changes torch's scores by as much as the graph differs (within a factor of 4), two
correct programs need not agree on this network, and the comparison counts as ill-conditioned.

A difference is also excused if a layer that TensorRT multiplies in float16 has values outside the
range of float16. Such a comparison counts as beyond float16.
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
from torch import Tensor, nn

from compressors.contracts import Plan, TargetName
from compressors.core.model import Model
from compressors.core.skipping import run_or_skip
from compressors.core.state.module_state import load
from compressors.core.units import Unit
from compressors.errors.compression import CompressionError, ContractBroken, ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.audit import audit
from compressors.lower.comparison.parity import check_parity
from compressors.lower.comparison.rounding_errors import rounding_errors
from compressors.lower.export import lower
from compressors.lower.passes.bfloat16_matmuls import has_bfloat16_matmuls, write_checkable
from compressors.lower.serving_wrapper import VECTOR, ServedGraph, input_names, served_graphs
from compressors.lower.targets.registry import lowering_target
from compressors.lower.targets.target import FLOAT32_ERROR
from infra.onnxruntime.sessions import Session, optimized_graph
from tests.random_networks import inputs as input_rows
from tests.random_networks.bench import write_bench
from tests.random_networks.float16_range import is_beyond_float16
from tests.random_networks.generator import Case, count_rows
from tests.random_networks.inputs import Rows, replace_invalid_ids, select_rows
from tests.random_networks.reference import decode_network

FloatArray = NDArray[np.float32]
EXCUSED_FACTOR = 4
"""A difference is excused up to this multiple of the effect of rounding errors."""
RELOAD_EVERY = 5
"""Only the result of every fifth step is loaded and compared on edge cases, to save time."""
PRESERVING = ("fold", "equalize", "smooth_quant")
"""Steps that change weights but not scores, except by rounding."""


@dataclass(frozen=True)
class Fault:
    """A result that is neither parity nor a refusal, and where it occurred.

    Attributes:
        seed: seed of the network.
        where: the step, target or comparison.
        kind: class of the error, ``wrong`` (a comparison failed), ``decoded`` (decoded weights
            differ too much from the originals) or ``raw exception`` (recpress did not convert it to
            one of its error classes).
        sentence: the message.
    """

    seed: int
    where: str
    kind: str
    sentence: str

    def line(self) -> str:
        """Return the fault as one line of text."""
        return f"seed {self.seed} | {self.where} | {self.kind} | {self.sentence}"


@dataclass
class Findings:
    """Results of a run.

    Attributes:
        faults: results that are wrong.
        refusals: number of refusals by error class and first words of the message.
        refused: every refusal; it is not a fault, but described in the same way.
        pairs: number of lowered units by format and target.
        counts: numbers of networks, steps and comparisons by name.
    """

    faults: list[Fault] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    refused: list[Fault] = field(default_factory=list)
    pairs: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Findings") -> None:
        """Add the results of another run."""
        self.faults += other.faults
        self.refused += other.refused
        for name in ("refusals", "pairs", "counts"):
            getattr(self, name).update(getattr(other, name))


class Checker:
    """Runs the checks on one network and collects the findings.

    Attributes:
        case: the network's config, signature and seed.
        source: the uncompressed model.
        tables: number of rows by table.
        bench: the rows that steps may read.
        rows: rows on which results are compared, by name: typical, edge, extreme, empty
            (``inputs.py``).
        number: number of steps applied so far.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.findings = case, folder, Findings()
        self.source = case.model()
        self.tables = count_rows(self.source.module, case.signature)
        self.bench = write_bench(case, self.source.module, self.tables, folder / "bench")
        seed, signature, scales = case.seed, case.signature, case.scales
        self.rows: dict[str, Rows] = {
            "typical": input_rows.draw_typical_rows(signature, self.tables, 48, scales, seed),
            "edge": input_rows.draw_edge_rows(signature, self.tables, scales, seed),
            "extreme": input_rows.draw_extreme_rows(signature, self.tables, scales, seed),
            "empty": input_rows.make_empty_rows(signature, self.tables, 2),
        }
        self.number = 0
        self.findings.counts["networks"] += 1

    def run_guarded(self, where: str, check: Callable[[], Any]) -> Any:
        """Run a check; return its result, or None after recording its refusal or fault."""
        try:
            return check()
        except (ParityLost, ContractBroken) as error:
            self.add_fault(where, type(error).__name__, str(error))
        except CompressionError as refusal:
            # A refusal can quote an exception of failed code. These two classes indicate a bug.
            if " got KeyError(" in str(refusal) or " got IndexError(" in str(refusal):
                self.add_fault(where, "raw exception", str(refusal))
            name = type(refusal).__name__
            self.findings.refusals[f"{name}: {_generalize(str(refusal))}"] += 1
            self.findings.refused.append(Fault(self.case.seed, where, name, str(refusal)))
        except AssertionError as error:
            self.add_fault(where, "wrong", str(error))
        except Exception as error:
            where_raised = traceback.extract_tb(error.__traceback__)[-1]
            self.add_fault(
                where,
                "raw exception",
                f"{type(error).__name__}: {error} ({Path(where_raised.filename).name}:"
                f"{where_raised.lineno})",
            )
        return None

    def add_fault(self, where: str, kind: str, sentence: str) -> None:
        """Record a fault."""
        self.findings.faults.append(Fault(self.case.seed, where, kind, sentence))

    def apply_step(self, step: Any, model: Model) -> Model | None:
        """Apply one step; return the model loaded from its stored state, or None if refused."""
        self.number += 1
        folder = self.folder / f"step{self.number}"
        where = f"{step.kind} {getattr(step, 'tables', ()) or getattr(step, 'layers', ())}"
        result: Model | None = self.run_guarded(
            where, lambda: run_or_skip(step, model, self.bench, folder)
        )
        if result is not None:
            self.findings.counts["steps"] += 1
            # The runner also compares loaded results, but not on edge cases.
            if self.number % RELOAD_EVERY == 0:
                self.run_guarded(f"{where} reload", lambda: self._check_reload(result, folder))
            if step.kind in PRESERVING:
                self.run_guarded(
                    where, lambda: self._check_same_function(step.kind, model.module, result.module)
                )
        return result

    def _check_reload(self, model: Model, folder: Path) -> None:
        reloaded = load(model.architecture, model.network, folder)
        assert [(u.name, u.format) for u in Unit.of(reloaded)] == [
            (u.name, u.format) for u in Unit.of(model.module)
        ], "a reloaded network has other units"
        rows = replace_invalid_ids(self.case.signature, self.tables, self.rows["edge"])[0]
        with torch.no_grad():
            first, second = model.module(**rows), reloaded(**rows)
        # NaN is not equal to itself, so it is replaced by an arbitrary number.
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0)), (
            "a reloaded network has other scores"
        )

    def _check_same_function(self, kind: str, before: nn.Module, after: nn.Module) -> None:
        for name in ("typical", "edge", "empty"):
            rows = replace_invalid_ids(self.case.signature, self.tables, self.rows[name])[0]
            # 2e-4 allows for the rounding of changed weights to float32.
            self._assert_close(f"{kind} on {name} rows", before, after, rows, share=2e-4)

    def check_module(self, packed: Model, plain: Model, where: str) -> None:
        """Compare a compressed module with the original modules with decoded weights.

        Args:
            packed: the compressed model.
            plain: the model before its formats were applied.
            where: the step or pass, for messages.
        """
        reference, faults = decode_network(packed.module, plain.module)
        for sentence in faults:
            self.add_fault(where, "decoded", sentence)
        formats = {unit.format for unit in Unit.of(packed.module)}
        # With another order of sums, inputs midway between two levels may round either way.
        rounding = formats & {"static_int8", "float8_dense", "weight_int8", "weight_int4"}
        share = 0.05 if rounding else 2e-4
        for name in ("typical", "edge", "extreme", "empty"):
            rows = replace_invalid_ids(self.case.signature, self.tables, self.rows[name])[0]
            what = f"{where} against decoded weights on {name} rows"
            self.run_guarded(
                what,
                lambda: self._assert_close(what, reference, packed.module, rows, share),  # noqa: B023
            )
        self.findings.counts["modules"] += 1

    def _assert_close(
        self, what: str, first: nn.Module, second: nn.Module, rows: Rows, share: float
    ) -> None:
        """Fail if the scores of two modules differ by more than rounding.

        The limit of the root mean square difference is ``share`` times the standard deviation of
        the first module's scores on typical rows, plus 1e-5.
        """
        with torch.no_grad():
            expected, actual = first(**rows).reshape(-1), second(**rows).reshape(-1)
        assert torch.equal(expected.isnan(), actual.isnan()), f"{what}: NaN at other rows"
        typical = replace_invalid_ids(self.case.signature, self.tables, self.rows["typical"])[0]
        with torch.no_grad():
            spread = float(first(**typical).nan_to_num().std()) if len(expected) else 0.0
        gap = (expected - actual).nan_to_num()
        limit = share * spread + 1e-5
        rms = float(gap.square().mean().sqrt()) if len(gap) else 0.0
        if rms > limit and not self.is_rounding(gap, first, rows, FLOAT32_ERROR, squash=False):
            raise AssertionError(f"{what}: differs by {rms:.2g} (limit {limit:.2g})")

    def is_rounding(
        self, gap: Tensor, module: nn.Module, rows: Rows, error: float, *, squash: bool
    ) -> bool:
        """Return whether rounding errors of one size explain the difference of scores ``gap``.

        Args:
            gap: the difference, float32 ``(rows,)``.
            module: the network in torch.
            rows: its inputs.
            error: error of a layer's output, relative to its absolute value.
            squash: whether the scores are sigmoids of the network's outputs.
        """
        with torch.no_grad():
            scores = [module(**rows)]
            for seed in (3, 4, 5):
                with rounding_errors(module, error, seed):
                    scores.append(module(**rows))
        scores = [torch.sigmoid(score) if squash else score for score in scores]
        changes = torch.stack([(x - scores[0]).nan_to_num() for x in scores[1:]])
        rms, largest = changes.square().mean().sqrt(), changes.abs().max()
        gap = gap.nan_to_num()
        excused = bool(
            gap.square().mean().sqrt() <= EXCUSED_FACTOR * rms
            and gap.abs().max() <= EXCUSED_FACTOR * largest
        )
        self.findings.counts["ill-conditioned"] += excused
        return excused

    def check_lowering(self, model: Model, target: TargetName, where: str) -> None:
        """Lower every graph of a model for one target and compare it with the module."""
        for graph in served_graphs(self.case.signature):
            what = f"{where} {graph.name} on {target}"
            self.run_guarded(what, lambda: self._check_graph(model, graph, target, what))  # noqa: B023

    def _check_graph(
        self, model: Model, graph: ServedGraph, target: TargetName, where: str
    ) -> None:
        path = self.folder / f"{graph.name}-{target}.onnx"
        lowered = lower(model.module, graph, target, path)
        plan = plan_of_graph(model, graph)
        session = _open_session(path, target, plan)
        self.findings.counts["graphs"] += 1
        self.findings.pairs.update(
            f"{unit.format} on {target}" for unit in Unit.of(graph.part(model.module))
        )
        scores: dict[str, FloatArray] = {}
        for name, rows in self.rows.items():
            inputs = {key: rows[key] for key in input_names(graph.signature)}
            expected = self.reference_scores(model.module, graph, inputs)
            with torch.no_grad():
                served = lowered.wrapper(*inputs.values()).numpy()
            # Both are torch; ``served`` also applies the policy for invalid ids.
            self._assert_same_scores(f"{where}: the policy in torch, {name} rows", expected, served)
            actual = session.scores({key: x.numpy() for key, x in inputs.items()})
            self.run_guarded(
                f"{where}, {name} rows",
                lambda: self._check_parity(served, actual, plan, target, model, graph, inputs),  # noqa: B023
            )
            scores[name] = actual
            self.findings.counts["parities"] += 1
        inputs = {key: self.rows["typical"][key] for key in input_names(graph.signature)}
        # A row must have the same score in a small batch as among all typical rows.
        for indices in ([0], [1, 2]):
            rows = select_rows(graph.signature, inputs, indices)
            batch_scores = session.scores({key: x.numpy() for key, x in rows.items()})
            self._check_parity(
                scores["typical"][indices], batch_scores, plan, target, model, graph, rows, few=True
            )
        if target == "onnxruntime":  # the audit reads the graph that ONNX Runtime optimized
            audit(optimized_graph(path), plan, lowered.tables, lowered.layers)
            self.findings.counts["audits"] += 1

    def reference_scores(self, module: nn.Module, graph: ServedGraph, rows: Rows) -> FloatArray:
        """Return torch's scores of a graph's part of the network, NaN for rows without a score.

        Invalid ids are replaced as ``inputs.replace_invalid_ids`` does.
        """
        valid_rows, without_score = replace_invalid_ids(graph.signature, self.tables, rows)
        with torch.no_grad():
            score = graph.part(module)(**valid_rows)
        if graph.outputs != (VECTOR,):  # not the graph of a tower, which returns vectors
            score = score.reshape(-1)
            score = torch.sigmoid(score) if graph.signature.single_output.form == "logit" else score
        score = score.clone()
        score[without_score] = torch.nan
        return score.numpy()

    def _assert_same_scores(self, what: str, expected: FloatArray, actual: FloatArray) -> None:
        assert expected.shape == actual.shape, f"{what}: {expected.shape} and {actual.shape}"
        assert np.array_equal(np.isnan(expected), np.isnan(actual)), (
            f"{what}: NaN in rows {np.flatnonzero(np.isnan(expected) != np.isnan(actual))[:5]}"
        )
        limit = 1e-5 + 1e-4 * float(np.nan_to_num(expected).std()) if expected.size else 1.0
        gap = float(np.nanmax(np.abs(expected - actual), initial=0.0))
        assert gap <= limit, f"{what}: differs by {gap:.2g} (limit {limit:.2g})"

    def _check_parity(
        self,
        expected: FloatArray,
        actual: FloatArray,
        plan: Plan | None,
        target: TargetName,
        model: Model,
        graph: ServedGraph,
        rows: Rows,
        *,
        few: bool = False,
    ) -> None:
        """Raise ``ParityLost`` if the scores differ by more than the limits and rounding errors.

        The limits depend on the standard deviation of the expected scores. If there are too few
        rows to measure it (``few``), or if it is less than a tenth of that of typical rows, the
        limits of typical rows apply.
        """
        typical = {key: self.rows["typical"][key] for key in input_names(graph.signature)}
        typical_scores = self.reference_scores(model.module, graph, typical)
        try:
            if few or not _spread(expected) > 0.1 * _spread(typical_scores):
                typical_scores = typical_scores[~np.isnan(typical_scores)].reshape(-1)
                # Compares typical scores with themselves, only to get their limits.
                limits = check_parity(typical_scores, typical_scores, plan, target)
                gap = float(np.nanmax(np.abs(expected - actual), initial=0.0))
                nan = np.array_equal(np.isnan(expected), np.isnan(actual))
                if expected.shape != actual.shape or not nan or gap > limits.largest_limit:
                    raise ParityLost(
                        ParityFailure(
                            code="parity_limit",
                            target=target,
                            measured={"at most": gap},
                            limits={"at most": limits.largest_limit},
                        )
                    )
            else:
                check_parity(expected, actual, plan, target)
        except ParityLost:
            valid_rows = replace_invalid_ids(graph.signature, self.tables, rows)[0]
            part = graph.part(model.module)
            if target != "onnxruntime" and is_beyond_float16(part, valid_rows):
                self.findings.counts["beyond float16"] += 1
                return
            nan = np.isnan(expected)
            if expected.shape != actual.shape or not np.array_equal(nan, np.isnan(actual)):
                raise
            error = lowering_target(target).rounding_error(plan)
            gap_tensor = torch.from_numpy(expected - actual)
            squash = graph.outputs != (VECTOR,) and graph.signature.single_output.form == "logit"
            if not self.is_rounding(gap_tensor, part, valid_rows, error, squash=squash):
                raise


def _spread(scores: FloatArray) -> float:
    known = scores[~np.isnan(scores)]
    return float(known.std()) if known.size else 0.0


def _generalize(sentence: str) -> str:
    """Return the first words of a sentence without names and numbers, to count refusals by it."""
    words = [
        "#" if any(c.isdigit() or c in "'\"_[]" for c in word) else word
        for word in sentence.split()
    ]
    return " ".join(words[:14])


def _open_session(path: Path, target: TargetName, plan: Plan | None) -> Session:
    """Open a graph in ONNX Runtime, which runs bfloat16 matmuls only in a rewritten graph."""
    if target == "onnxruntime" or not has_bfloat16_matmuls(plan):
        return Session(path, threads=1)
    checkable = path.with_name(f"checkable-{path.name}")
    write_checkable(path, checkable)
    return Session(checkable, threads=1)


def plan_of_graph(model: Model, graph: ServedGraph) -> Plan | None:
    """Return the plan's lines for the units in a graph."""
    if model.plan is None or not graph.module:  # an empty path: the graph of the whole model
        return model.plan
    modules = set(graph.part(model.module).modules())
    names = {unit.name for unit in Unit.of(model.module) if unit.module in modules}
    return Plan(lines=tuple(line for line in model.plan.lines if line.module in names))


def run_check(case: Case, check: Callable[[Checker], None]) -> Findings:
    """Run a check on one case and return its findings."""
    with tempfile.TemporaryDirectory(prefix="network-") as scratch:
        checker = Checker(case, Path(scratch))
        check(checker)
        return checker.findings


def list_float32_units(model: Model) -> tuple[Sequence[str], Sequence[str]]:
    """Return the names of the float32 tables and of the float32 layers of a model."""
    units = Unit.of(model.module)
    tables = [u.name for u in units if u.role == "table" and u.format == "float32"]
    layers = [u.name for u in units if u.role == "dense" and u.format == "float32"]
    return tables, layers
