"""Simplify an exported graph.

This runs the passes of onnxscript's ``optimize_ir``, but with the rewrite rules of
``exact_rules.py``.
"""

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass

from compressors.lower.passes.exact_rules import RULES

MOST_MERGED = 1024
"""Largest number of elements of initializers that are merged if equal, as in ``optimize_ir``."""

ROUNDS = 2
"""Largest number of rounds of constant folding and rewriting, as in ``optimize_ir``."""


def simplify(
    model: ir.Model, may_fold: Callable[[ir.Node], bool | None], *, most_merged: int = MOST_MERGED
) -> None:
    """Inline functions, fold constants and remove operators without effect, in place.

    Args:
        model: the exported graph.
        may_fold: returns whether a node with constant inputs may be replaced by its result; None
            for the default of onnxscript's constant folding.
        most_merged: largest number of elements of initializers that are merged if they are equal.
    """
    passes.InlinePass()(model)
    for _ in range(ROUNDS):
        folded = fold_constants_ir(model, onnx_shape_inference=True, should_fold=may_fold)
        rewritten = ir.passes.Sequential(
            RewritePass(RULES),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),
            passes.RemoveUnusedOpsetsPass(),
        )(model)
        if not (folded.modified or rewritten.modified):
            break
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(size_limit=most_merged),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
