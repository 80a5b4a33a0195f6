"""Smoke test: check before packing that a network runs on the inputs its signature allows."""

import torch
from torch import Tensor, nn

from compressors.contracts import DenseInput, Signature, is_out_of_memory
from compressors.core.batches import example
from compressors.core.runner import rows_of_tables
from compressors.core.state.construction import differing_tensors
from compressors.errors.compression import ModelRefused
from compressors.lower.serving_wrapper import input_names, served_graphs

ROWS = 8
TOWER_TOLERANCE = 1e-4  # relative to 1 + the largest score: float32 sums in another order
REPEAT_TOLERANCE = (
    1e-5  # relative to 1 + the largest score: memory alignment changes the order of sums
)


def smoke_test(
    model: nn.Module, signature: Signature, path: str, again: nn.Module | None = None
) -> None:
    """Score generated rows, including the highest id of every table.

    Args:
        model: the loaded network.
        signature: its inputs and output.
        path: its class, for the message.
        again: the same bundle, loaded a second time; both must give the same scores.

    Raises:
        ModelRefused: its weights are not float32; it fails on inputs of this signature; its output
            is not one finite score per row; its towers do not give that score; or the same rows get
            another score in a second call or after a second load.
        NothingToCompress: an input names a table the network does not have.
    """
    other = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}
    if other:
        raise ModelRefused("weights_not_float32", architecture=path, dtypes=tuple(sorted(other)))
    rows_of_table = rows_of_tables(model, signature)
    inputs = example(signature, rows_of_table, ROWS)
    for item in signature.inputs:
        if not isinstance(item, DenseInput):
            inputs[item.name][-1:] = rows_of_table[item.table] - 1
    try:
        with torch.no_grad():
            score = model(**inputs)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise ModelRefused("network_fails", architecture=path, problem=repr(fault)) from fault
    _check_score(score, path)
    _require_repeatable(model, again, inputs, score, path)
    if signature.towers is not None:
        _check_towers(model, signature, inputs, score.reshape(-1), path)


def _check_score(score: object, path: str) -> None:
    shape = list(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
    fits = isinstance(score, torch.Tensor) and shape in ([ROWS], [ROWS, 1])
    if not isinstance(score, torch.Tensor) or not fits or not bool(torch.isfinite(score).all()):
        raise (
            ModelRefused("score_not_finite", architecture=path, rows=ROWS)
            if fits
            else ModelRefused("score_shape", architecture=path, rows=ROWS, got=str(shape))
        )


def _require_repeatable(
    model: nn.Module,
    again: nn.Module | None,
    inputs: dict[str, Tensor],
    score: Tensor,
    path: str,
) -> None:
    """Raise if the same rows get other scores in a second call or after a second load."""
    tolerance = REPEAT_TOLERANCE * (1 + float(score.abs().max()))
    with torch.no_grad():
        gap = float((model(**inputs) - score).abs().max())
        if not gap <= tolerance:
            raise ModelRefused("calls_differ", architecture=path, gap=gap)
        if again is None:
            return
        gap = float((again(**inputs) - score).abs().max())
    if not gap <= tolerance:
        raise ModelRefused(
            "loads_differ",
            architecture=path,
            gap=gap,
            names=tuple(differing_tensors(model, again)[:5]),
        )


def _check_towers(
    model: nn.Module, signature: Signature, inputs: dict[str, Tensor], score: Tensor, path: str
) -> None:
    """Raise if the dot product of both towers, which are served, is not the network's score."""
    vectors: dict[str, Tensor] = {}
    for form in served_graphs(signature):
        try:
            part = form.part(model)
            with torch.no_grad():
                vector = part(**{name: inputs[name] for name in input_names(form.signature)})
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            raise ModelRefused(
                "tower_fails",
                architecture=path,
                tower=form.name,
                module=form.module,
                inputs=tuple(input_names(form.signature)),
                problem=repr(fault),
            ) from fault
        shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        if not isinstance(vector, Tensor) or vector.dim() != 2 or len(vector) != ROWS:
            raise ModelRefused(
                "tower_vector_shape",
                architecture=path,
                tower=form.name,
                module=form.module,
                rows=ROWS,
                got=str(shape),
            )
        vectors[form.name] = vector
    if vectors["query"].shape != vectors["item"].shape:
        raise ModelRefused(
            "tower_lengths_differ",
            architecture=path,
            query=vectors["query"].shape[1],
            item=vectors["item"].shape[1],
        )
    product = (vectors["query"] * vectors["item"]).sum(dim=1)
    gap = float((product - score).abs().max())
    if not gap <= TOWER_TOLERANCE * (1 + float(score.abs().max())):
        raise ModelRefused("towers_not_the_score", architecture=path, gap=gap)
