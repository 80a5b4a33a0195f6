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
TOWER_TOLERANCE = 1e-4  # of the largest score: float32 sums in another order
REPEAT_TOLERANCE = 1e-5  # of the largest score: the same sums over memory aligned differently


def smoke_test(
    model: nn.Module, signature: Signature, path: str, again: nn.Module | None = None
) -> None:
    """Score generated rows, among them the highest id of every table.

    Args:
        model: the loaded network.
        signature: its inputs and output.
        path: its class, for the message.
        again: the same bundle, loaded a second time; both must give the same scores.

    Raises:
        ModelRefused: its weights are not float32, it fails on inputs of this signature, or what it
            returns is not one finite score a row; its towers do not give that score; or the same
            rows get another score in another call or after another load.
        NothingToCompress: an input names a table the network does not have.
    """
    other = {str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}
    if other:
        raise ModelRefused(
            f"{path} holds {', '.join(sorted(other))} weights; a bundle begins with float32. "
            f"Convert them with model.float() before saving."
        )
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
        raise ModelRefused(
            f"{path} fails on made-up rows that its signature allows (any id below its table's "
            f"rows): {fault!r}. Correct the inputs in model.json, or the network."
        ) from fault
    _check_score(score, path)
    _require_repeatable(model, again, inputs, score, path)
    if signature.towers is not None:
        _check_towers(model, signature, inputs, score.reshape(-1), path)


def _check_score(score: object, path: str) -> None:
    shape = list(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
    fits = isinstance(score, torch.Tensor) and shape in ([ROWS], [ROWS, 1])
    if not isinstance(score, torch.Tensor) or not fits or not bool(torch.isfinite(score).all()):
        raise ModelRefused(
            f"{path} must return one finite score a row, (rows,) or (rows, 1); on {ROWS} rows it "
            f"returned {shape}{' with NaN or inf' if fits else ''}."
        )


def _require_repeatable(
    model: nn.Module,
    again: nn.Module | None,
    inputs: dict[str, Tensor],
    score: Tensor,
    path: str,
) -> None:
    """Refuse scores that depend on chance: nothing measured with them would be comparable."""
    tolerance = REPEAT_TOLERANCE * (1 + float(score.abs().max()))
    with torch.no_grad():
        gap = float((model(**inputs) - score).abs().max())
        if not gap <= tolerance:
            raise ModelRefused(
                f"Expected {path} to give the same rows the same scores, got scores up to "
                f"{gap:.3g} apart in two calls. Something random is active in evaluation mode: "
                f"pass training=self.training to functional dropout."
            )
        if again is None:
            return
        gap = float((again(**inputs) - score).abs().max())
    if not gap <= tolerance:
        names = ", ".join(map(repr, differing_tensors(model, again)[:5]))
        what = f"{names}, which no file stores" if names else "a value that no file stores"
        raise ModelRefused(
            f"Expected {path} to score alike whenever it is loaded, got scores up to {gap:.3g} "
            f"apart from two loads: its constructor draws {what}. Register it as a parameter or "
            f"buffer and save the weights again, or compute it from the configuration."
        )


def _check_towers(
    model: nn.Module, signature: Signature, inputs: dict[str, Tensor], score: Tensor, path: str
) -> None:
    """What is served are the towers, so their dot product must be what the network says."""
    vectors: dict[str, Tensor] = {}
    for form in served_graphs(signature):
        where = f"{path}: tower {form.name!r} ({form.module})"
        read = ", ".join(input_names(form.signature))
        try:
            part = form.part(model)
            with torch.no_grad():
                vector = part(**{name: inputs[name] for name in input_names(form.signature)})
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            raise ModelRefused(
                f"{where} fails when it is called with {read}: {fault!r}. Name the submodule that "
                f"takes exactly the inputs listed for it in model.json."
            ) from fault
        shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        if not isinstance(vector, Tensor) or vector.dim() != 2 or len(vector) != ROWS:
            raise ModelRefused(
                f"{where} must return one vector a row, (rows, dim); on {ROWS} rows it returned "
                f"{shape}."
            )
        vectors[form.name] = vector
    if vectors["query"].shape != vectors["item"].shape:
        raise ModelRefused(
            f"{path}: the query tower's vectors have {vectors['query'].shape[1]} numbers, the item "
            f"tower's {vectors['item'].shape[1]}. A score is their dot product, so they must be of "
            f"the same length."
        )
    product = (vectors["query"] * vectors["item"]).sum(dim=1)
    gap = float((product - score).abs().max())
    if not gap <= TOWER_TOLERANCE * (1 + float(score.abs().max())):
        raise ModelRefused(
            f"{path}: the dot product of the towers' vectors is up to {gap:.3g} away from the "
            f"network's own score on made-up rows. Only the vectors are served: put scales, biases "
            f"and norms into the towers, and let forward return the dot product."
        )
