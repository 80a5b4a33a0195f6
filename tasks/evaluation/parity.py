"""Compare a module with its graph on the same rows, and explain the differences."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressors.contracts import Plan, is_out_of_memory
from compressors.contracts.targets.runtime import Session
from compressors.core.batches import format_row, row_of
from compressors.errors.compression import ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.bfloat16_products import write_checkable
from compressors.lower.export import Lowered, exported
from compressors.lower.findings import Parity
from compressors.lower.first_difference import GraphValue, first_difference, run_traced
from compressors.lower.parity import FloatArray, allowed_share, compare, gap_of
from compressors.lower.serving_wrapper import input_names
from compressors.lower.targets.registry import lowering_target
from infra.errors import InfraError
from infra.onnxruntime.sessions import graph_values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """A module and its graph, both ready to score the same rows.

    ``path`` is the graph in a form that ONNX Runtime runs, which exists for every target.
    """

    model: nn.Module
    lowered: Lowered
    plan: Plan | None
    target: str
    most_rows: int
    path: Path
    session: Session

    def parity(self, inputs: dict[str, Tensor], rows_from: str) -> tuple[Parity, FloatArray]:
        """Compare on some rows; also returns the module's scores.

        Raises:
            ParityLost: contains the row, both scores and the first tensor that differs.
        """
        expected, found = self.scores(inputs, rows_from)
        try:
            return compare(expected, found, self.plan, self.target), expected
        except ParityLost as fault:
            raise self.explained(fault.failure, inputs, rows_from) from None

    def scores(self, inputs: dict[str, Tensor], rows_from: str) -> tuple[FloatArray, FloatArray]:
        """Return the scores of the module and of the graph.

        Raises:
            ParityLost: the graph does not run on these rows.
        """
        expected = self._module(inputs)
        try:
            return expected, self.session.scores(_arrays(inputs))
        except InfraError as fault:
            failure = ParityFailure(
                code="parity_run",
                target=self.target,
                rows=expected.shape[0],
                reason=str(fault),
                row=self._first_failing(inputs, expected.shape[0]),
            )
            raise self.explained(failure, inputs, rows_from) from fault

    def same_alone(self, among: FloatArray, inputs: dict[str, Tensor], parity: Parity) -> None:
        """Raise if a model's or graph's score of a row depends on other rows of the batch.

        Args:
            among: the module's scores of these rows in a large batch.
            inputs: a few rows, as a separate batch.
            parity: the parity of the large batch.

        Raises:
            ParityLost: contains which of the two, and the difference.
        """
        rows_from = "the data"
        network, graph = self.scores(inputs, rows_from)
        for side, scores in (("network", network), ("graph", graph)):
            failure = ParityFailure(
                code="parity_batch",
                target=self.target,
                side=side,
                rows=len(among),
                limits={"largest": parity.largest_limit},
                shapes=(among.shape, scores.shape),
                measured={"largest": np.inf},
            )
            if scores.shape != among.shape:
                raise self.explained(failure, inputs, rows_from)
            gap = gap_of(among, scores)
            if gap.max(initial=0.0) <= parity.largest_limit:
                continue
            place = np.unravel_index(int(np.argmax(gap)), gap.shape)
            failure = replace(
                failure,
                row=int(place[0]),
                component=int(place[1]) if len(place) > 1 else None,
                expected=float(among[place]),
                found=float(scores[place]),
                measured={"largest": float(gap[place])},
            )
            raise self.explained(failure, inputs, rows_from)

    def explained(
        self, failure: ParityFailure, inputs: dict[str, Tensor], rows_from: str
    ) -> ParityLost:
        """Build the error of a failure, with the row's inputs and the first tensor that differs."""
        form = self.lowered.served.form
        failure = replace(failure, graph=form.name, rows_from=rows_from)
        if failure.row is None:
            return ParityLost(failure)
        alone = row_of(inputs, form.signature, failure.row)
        failure = replace(failure, inputs=format_row(alone, form.signature))
        if failure.code == "parity_run" or failure.side == "network":
            return ParityLost(failure)
        try:
            return ParityLost(self._located(failure, alone, inputs))
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            # No exception of this diagnosis may replace the original failure.
            log.warning("The first tensor that differs was not determined: %r", fault)
            return ParityLost(failure)

    def _located(
        self, failure: ParityFailure, alone: dict[str, Tensor], inputs: dict[str, Tensor]
    ) -> ParityFailure:
        """Add the first tensor that differs: with the row alone, else with all rows."""
        form, names = self.lowered.served.form, input_names(self.lowered.served.form.signature)
        _, program = exported(self.model, form, self.target, self.most_rows)
        if program.exported_program is None:
            return failure
        for rows in (alone, inputs):
            traced = run_traced(program.exported_program, [rows[name] for name in names])
            values = [GraphValue(*value) for value in graph_values(self.path, _arrays(rows))]
            allowed = allowed_share(self.plan, self.target)
            module, output = self._module(rows), traced.output.numpy()
            limit = failure.limits.get("at most", failure.limits.get("largest", 1e-5))
            is_wrong = module.shape != output.shape or gap_of(module, output).max() > limit
            tensor = first_difference(traced, values, form.output, allowed)
            is_clear = tensor is not None and tensor.is_clear
            if is_wrong or is_clear:
                clear = tensor if is_clear else None
                return replace(failure, tensor=clear, is_exported_wrong=bool(is_wrong))
        return replace(failure, tensor=tensor)

    def _module(self, inputs: Mapping[str, Tensor]) -> FloatArray:
        names = input_names(self.lowered.served.form.signature)
        with torch.no_grad():
            scores: Tensor = self.lowered.served(*(inputs[name] for name in names))
        result: FloatArray = scores.numpy()
        return result

    def _first_failing(self, inputs: dict[str, Tensor], rows: int) -> int | None:
        """Find the first row that the runtime refuses as a batch of one."""
        signature = self.lowered.served.form.signature
        for row in range(rows):
            try:
                self.session.scores(_arrays(row_of(inputs, signature, row)))
            except InfraError:
                return row
        return None


@contextlib.contextmanager
def checkable(path: Path, target: str, plan: Plan | None) -> Iterator[Path]:
    """Return a graph ONNX Runtime can run: the file itself, or a copy without bfloat16 Gemms."""
    if not lowering_target(target).has_unsupported_products(plan):
        yield path
        return
    written = path.with_name(f"checkable-{path.name}")
    try:
        write_checkable(path, written)
        yield written
    finally:
        written.unlink(missing_ok=True)  # every file of the folder is stored


def _arrays(inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}
