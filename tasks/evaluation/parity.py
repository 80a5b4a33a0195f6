"""Compare a torch module with the graph exported from it, and diagnose differences. No Prefect.

Parity means that both return the same scores for the same rows, within a tolerance. ``Parity`` has
the measured differences and their limits. ``ParityFailure`` describes a comparison that failed;
``ParityLost`` is the error with this description.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressors.contracts import Plan, is_out_of_memory
from compressors.contracts.targets.runtime import Session
from compressors.core.scores import join_columns
from compressors.errors.compression import ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.comparison.first_difference import GraphValue, first_difference, run_traced
from compressors.lower.comparison.parity import (
    FloatArray,
    absolute_differences,
    add_worst_row,
    allowed_share,
    check_outputs,
)
from compressors.lower.comparison.rounding_errors import rounding_errors
from compressors.lower.export import Lowered
from compressors.lower.findings import Parity
from compressors.lower.passes.bfloat16_matmuls import write_checkable
from compressors.lower.program import export_program
from compressors.lower.serving_wrapper import input_names, stack_outputs
from compressors.lower.targets.registry import lowering_target
from infra.errors import InfraError
from infra.onnxruntime.sessions import graph_values
from tasks.evaluation.single_rows import format_row, take_row

log = logging.getLogger(__name__)

OPERATOR_ROUNDING = 4
"""Largest difference of one operator's output from torch's for the same inputs, in rounding errors
of the output's largest value."""
ROUNDING_REPETITIONS = 3
"""How often the effect of rounding errors is measured, since small batches give few values."""


@dataclass(frozen=True)
class GraphCheck:
    """Compares the scores of a torch module and its graph on the same rows.

    Attributes:
        model: the whole torch model.
        lowered: the exported graph and the part of the model it computes.
        plan: plan lines of the graph's units, which determine the tolerance; None for an untouched
            model.
        target: name of the target.
        most_rows: the largest batch the graph must accept.
        path: file of the graph, in a form that ONNX Runtime can run.
        session: the graph, loaded in a runtime.
    """

    model: nn.Module
    lowered: Lowered
    plan: Plan | None
    target: str
    most_rows: int
    path: Path
    session: Session

    def parity(
        self, inputs: dict[str, Tensor], rows_from: str
    ) -> tuple[tuple[Parity, ...], FloatArray]:
        """Compare module and graph; returns a parity for each output, and the module's outputs.

        Args:
            inputs: one batch, by input name.
            rows_from: origin of the rows, for error messages.

        Raises:
            ParityLost: the outputs differ by more than the tolerance; the error has the row, both
                outputs and the first tensor that differs. It is also raised if the tolerance is
                larger than usual, because the network is sensitive to rounding, and an operator of
                the graph returns another result than torch for the same inputs.
        """
        expected, actual = self.scores(inputs, rows_from)
        try:
            parities = check_outputs(
                expected,
                actual,
                self.lowered.wrapper.served_graph.outputs,
                self.plan,
                self.target,
                lambda: self._measure_rounding(inputs, expected),
            )
        except ParityLost as fault:
            raise self.parity_error(fault.failure, inputs, rows_from) from None
        if any(parity.by_rounding for parity in parities):
            self._require_same_operators(expected, actual, inputs, rows_from)
        return parities, expected

    def scores(self, inputs: dict[str, Tensor], rows_from: str) -> tuple[FloatArray, FloatArray]:
        """Return the outputs of the module and of the graph.

        These are scores ``(rows,)``, ``(rows, outputs)`` if there are several, or vectors
        ``(rows, dim)``.

        Args:
            inputs: one batch, by input name.
            rows_from: origin of the rows, for error messages.

        Raises:
            ParityLost: the graph does not run on these rows.
        """
        expected = self._compute_module_scores(inputs)
        try:
            return expected, self.session.scores(_to_arrays(inputs))
        except InfraError as fault:
            failure = ParityFailure(
                code="parity_run",
                target=self.target,
                rows=expected.shape[0],
                reason=str(fault),
                row=self._find_first_failing_row(inputs, expected.shape[0]),
            )
            raise self.parity_error(failure, inputs, rows_from) from fault

    def require_same_in_small_batch(
        self, expected: FloatArray, inputs: dict[str, Tensor], parities: Sequence[Parity]
    ) -> None:
        """Raise if a score of the module or the graph depends on other rows of the batch.

        Args:
            expected: the module's scores of these rows, computed in a large batch.
            inputs: the same rows as a separate, small batch.
            parities: the parity of each output in the large batch, which contains the tolerance.

        Raises:
            ParityLost: contains which of the two depends on other rows, and the difference.
        """
        rows_from = "the data"
        module_scores, graph_scores = self.scores(inputs, rows_from)
        outputs = self.lowered.wrapper.served_graph.outputs
        # ``side``: which of the two depends on other rows. The difference counts as infinite until
        # the shapes are known to be equal.
        for side, scores in (("network", module_scores), ("graph", graph_scores)):
            failure = ParityFailure(
                code="parity_batch",
                target=self.target,
                side=side,
                rows=len(expected),
                limits={"largest": max(parity.largest_limit for parity in parities)},
                shapes=(expected.shape, scores.shape),
                measured={"largest": np.inf},
            )
            if scores.shape != expected.shape:
                raise self.parity_error(failure, inputs, rows_from)
            if len(outputs) == 1:
                pairs = [("", expected, scores)]
            else:
                columns = zip(outputs, expected.T, scores.T, strict=True)
                pairs = [(name, first, second) for name, first, second in columns]
            for (name, first, second), parity in zip(pairs, parities, strict=True):
                gap = absolute_differences(first, second)
                if gap.max(initial=0.0) <= parity.largest_limit:
                    continue
                index = np.unravel_index(int(np.argmax(gap)), gap.shape)
                failure = replace(
                    failure,
                    row=int(index[0]),
                    component=int(index[1]) if len(index) > 1 else None,
                    output=name,
                    expected=float(first[index]),
                    found=float(second[index]),
                    measured={"largest": float(gap[index])},
                    limits={"largest": parity.largest_limit},
                )
                raise self.parity_error(failure, inputs, rows_from)

    def parity_error(
        self, failure: ParityFailure, inputs: dict[str, Tensor], rows_from: str
    ) -> ParityLost:
        """Build the error of a failure, with the row's inputs and the first tensor that differs."""
        served = self.lowered.wrapper.served_graph
        failure = replace(failure, graph=served.name, rows_from=rows_from)
        if failure.row is None:
            return ParityLost(failure)
        single_row = take_row(inputs, served.signature, failure.row)
        failure = replace(failure, inputs=format_row(single_row, served.signature))
        if failure.code == "parity_run" or failure.side == "network":
            return ParityLost(failure)
        try:
            return ParityLost(self._add_differing_tensor(failure, single_row, inputs))
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            # No exception of this diagnosis may replace the original failure.
            log.warning("The first tensor that differs was not determined: %r", fault)
            return ParityLost(failure)

    def _require_same_operators(
        self,
        expected: FloatArray,
        actual: FloatArray,
        inputs: dict[str, Tensor],
        rows_from: str,
    ) -> None:
        """Raise if an operator of the graph differs from torch's for the same inputs.

        The operators are compared on the row with the largest difference.

        Raises:
            ParityLost: contains the operator's output.
        """
        served = self.lowered.wrapper.served_graph
        gap = absolute_differences(expected, actual)
        failure = ParityFailure(
            code="parity_operator",
            target=self.target,
            graph=served.name,
            rows_from=rows_from,
            measured={"largest": float(gap.max())},
        )
        failure = add_worst_row(failure, gap, expected, actual)
        row = take_row(inputs, served.signature, failure.row or 0)
        _, program = export_program(self.model, served, self.target, self.most_rows)
        if program.exported_program is None:
            raise ParityLost(failure)
        values = [GraphValue(*value) for value in graph_values(self.path, _to_arrays(row))]
        traced = run_traced(
            program.exported_program,
            [row[name] for name in input_names(served.signature)],
            {value.name: value.value for value in values},
        )
        allowed = OPERATOR_ROUNDING * lowering_target(self.target).rounding_error(self.plan)
        tensor = first_difference(traced, values, served.outputs, allowed)
        # A clear difference is larger than rounding explains.
        if tensor is not None and tensor.is_clear:
            raise ParityLost(replace(failure, tensor=tensor))

    def _add_differing_tensor(
        self, failure: ParityFailure, single_row: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> ParityFailure:
        """Add the first tensor that differs between the exported program and the graph.

        The exported program is the torch program from which the graph was written. If its outputs
        already differ from the module's, the export is wrong, not the graph.

        The failing row alone is compared first. If nothing differs, the whole batch is compared,
        since a difference may depend on the other rows.
        """
        served = self.lowered.wrapper.served_graph
        names = input_names(served.signature)
        _, program = export_program(self.model, served, self.target, self.most_rows)
        if program.exported_program is None:
            return failure
        for rows in (single_row, inputs):
            traced = run_traced(program.exported_program, [rows[name] for name in names])
            values = [GraphValue(*value) for value in graph_values(self.path, _to_arrays(rows))]
            # The allowed difference of a tensor, relative to its largest absolute value.
            allowed = allowed_share(self.plan, self.target)
            expected, output = (
                self._compute_module_scores(rows),
                join_columns(traced.outputs).numpy(),
            )
            # The limit of the largest difference: "at most" in a failure of the whole comparison,
            # "largest" in one of small batches. A failure because of NaN has no limits; then only
            # rounding differences are allowed.
            limit = failure.limits.get("at most", failure.limits.get("largest", 1e-5))
            is_export_wrong = (
                expected.shape != output.shape
                or absolute_differences(expected, output).max() > limit
            )
            tensor = first_difference(traced, values, served.outputs, allowed)
            is_clear = tensor is not None and tensor.is_clear
            if is_export_wrong or is_clear:
                cause = tensor if is_clear else None
                return replace(failure, tensor=cause, is_exported_wrong=bool(is_export_wrong))
        return replace(failure, tensor=tensor)

    def _compute_module_scores(self, inputs: Mapping[str, Tensor]) -> FloatArray:
        names = input_names(self.lowered.wrapper.served_graph.signature)
        with torch.no_grad():
            scores = stack_outputs(self.lowered.wrapper(*(inputs[name] for name in names)))
        result: FloatArray = scores.numpy()
        return result

    def _measure_rounding(self, inputs: Mapping[str, Tensor], expected: FloatArray) -> FloatArray:
        """Return the changes of the module's outputs by rounding errors of the target.

        Args:
            inputs: one batch, by input name.
            expected: the module's outputs for this batch without errors.

        Returns:
            ``(ROUNDING_REPETITIONS, *expected.shape)``, each with other errors.
        """
        network = self.lowered.wrapper
        size = lowering_target(self.target).rounding_error(self.plan)
        changes = []
        for seed in range(ROUNDING_REPETITIONS):
            with rounding_errors(network, size, seed):
                changes.append(self._compute_module_scores(inputs) - expected)
        return np.stack(changes)

    def _find_first_failing_row(self, inputs: dict[str, Tensor], rows: int) -> int | None:
        """Find the first row that the runtime refuses as a batch of one."""
        signature = self.lowered.wrapper.served_graph.signature
        for row in range(rows):
            try:
                self.session.scores(_to_arrays(take_row(inputs, signature, row)))
            except InfraError:
                return row
        return None


@contextlib.contextmanager
def runnable_graph(path: Path, target: str, plan: Plan | None) -> Iterator[Path]:
    """Yield a graph that ONNX Runtime can run: the file itself, or a copy without bfloat16 Gemms.

    The copy is deleted afterwards, since every file of the folder is stored.
    """
    if not lowering_target(target).has_unsupported_matmuls(plan):
        yield path
        return
    copy = path.with_name(f"checkable-{path.name}")
    try:
        write_checkable(path, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _to_arrays(inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}
