"""Smoke test: check, before a bundle is written, that its network runs as the signature says."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, is_out_of_memory
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import rows_of_tables
from compressors.core.scores import call_network, network_scores, scores_of, tower_vectors
from compressors.core.state.construction import differing_tensors
from compressors.errors.compression import ModelRefused
from compressors.lower.serving_wrapper import input_names, served_graphs

ROWS = 8
"""Generated rows that are scored."""

TOWER_TOLERANCE = 1e-4
"""Largest difference between the network's scores and the dot products of its towers' vectors,
relative to 1 + the largest score. They add float32 numbers in another order."""

REPEAT_TOLERANCE = 1e-5
"""Largest difference between two calls or two loads, relative to 1 + the largest score. Memory
alignment changes the order of float32 sums."""


def smoke_test(
    model: nn.Module, signature: Signature, path: str, second_load: nn.Module | None = None
) -> None:
    """Score generated rows, including the highest id of every table, and check the scores.

    Args:
        model: the loaded network.
        signature: describes its inputs and output.
        path: the import path of its class, for the message.
        second_load: the same bundle, loaded a second time; both must give the same scores.

    Raises:
        ModelRefused: its weights are not float32; it fails on inputs of this signature; an output
            is not one finite score per row, or it cannot score one row alone; its towers do not
            give that score; or the same rows get another score in a second call or after a second
            load.
        NothingToCompress: an input names a table that the network does not have.
    """
    dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if other := dtypes - {"torch.float32"}:
        raise ModelRefused("weights_not_float32", architecture=path, dtypes=tuple(sorted(other)))
    inputs = generate_inputs(signature, rows_of_tables(model, signature), ROWS, with_largest=True)
    score = _score_rows(model, inputs, signature, path)
    _require_repeatable(model, second_load, inputs, score, signature, path)
    _require_single_row(model, signature, path)
    if signature.towers is not None:
        _check_towers(model, signature, inputs, score, path)


def _score_rows(
    model: nn.Module, inputs: dict[str, Tensor], signature: Signature, path: str
) -> Tensor:
    """Return the scores of ``ROWS`` rows, ``(rows,)`` or ``(rows, outputs)``.

    Raises:
        ModelRefused: the network fails, or its scores are invalid (``_require_scores``).
    """
    try:
        with torch.no_grad():
            returned = call_network(model, inputs, signature)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise ModelRefused("network_fails", architecture=path, problem=repr(fault)) from fault
    return _require_scores(returned, signature, path)


def _require_scores(returned: object, signature: Signature, path: str) -> Tensor:
    """Return the scores in what the network returned, ``(rows,)`` or ``(rows, outputs)``.

    Raises:
        ModelRefused: an output is not one finite score per row, or the number of outputs is wrong.
    """
    if not signature.has_several_outputs and not isinstance(returned, tuple | list | Mapping):
        shape = list(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        if shape not in ([ROWS], [ROWS, 1]):
            raise ModelRefused("score_shape", architecture=path, rows=ROWS, got=str(shape))
    names = tuple(output.name for output in signature.outputs)
    try:
        scores = scores_of(returned, signature)
    except (TypeError, ValueError, RuntimeError) as fault:
        raise ModelRefused(
            "outputs_shape", architecture=path, outputs=names, rows=ROWS, problem=str(fault)
        ) from fault
    if len(scores) != ROWS:
        got = f"{len(scores)} rows"
        raise ModelRefused(
            "outputs_shape", architecture=path, outputs=names, rows=ROWS, problem=got
        )
    if not bool(torch.isfinite(scores).all()):
        raise ModelRefused("score_not_finite", architecture=path, rows=ROWS)
    return scores


def _require_repeatable(
    model: nn.Module,
    second_load: nn.Module | None,
    inputs: dict[str, Tensor],
    score: Tensor,
    signature: Signature,
    path: str,
) -> None:
    """Raise ``ModelRefused`` if a second call or a second load gives other scores."""
    tolerance = REPEAT_TOLERANCE * (1 + float(score.abs().max()))
    with torch.no_grad():
        gap = float((network_scores(model, inputs, signature) - score).abs().max())
        if not gap <= tolerance:
            raise ModelRefused("calls_differ", architecture=path, gap=gap)
        if second_load is None:
            return
        gap = float((network_scores(second_load, inputs, signature) - score).abs().max())
    if not gap <= tolerance:
        raise ModelRefused(
            "loads_differ",
            architecture=path,
            gap=gap,
            names=tuple(differing_tensors(model, second_load)[:5]),
        )


def has_own_score(model: nn.Module, signature: Signature) -> bool:
    """Whether the network's method can be called and returns one finite score for each row."""
    inputs = generate_inputs(signature, rows_of_tables(model, signature), ROWS)
    try:
        _score_rows(model, inputs, signature, path="")  # the message is not shown
    except ModelRefused:
        return False
    return True


def must_repeat_single_row(model: nn.Module, signature: Signature) -> bool:
    """Whether a network cannot score one row, but can score two equal ones.

    A frequent cause is ``squeeze()`` without a dimension. See ``Signature.repeat_single_row``.
    """
    repeating = signature.model_copy(update={"repeat_single_row": True})
    return not _can_score_single_row(model, signature) and _can_score_single_row(model, repeating)


def _can_score_single_row(model: nn.Module, signature: Signature) -> bool:
    try:
        _require_single_row(model, signature, path="")  # the message is not shown
    except ModelRefused:
        return False
    return True


def _require_single_row(model: nn.Module, signature: Signature, path: str) -> None:
    """Raise ``ModelRefused`` unless the network scores a request of one row."""
    inputs = generate_inputs(signature, rows_of_tables(model, signature), rows=1)
    try:
        with torch.no_grad():
            scores = network_scores(model, inputs, signature)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise ModelRefused("single_row_fails", architecture=path, problem=repr(fault)) from fault
    if len(scores) != 1:
        problem = f"{len(scores)} scores"
        raise ModelRefused("single_row_fails", architecture=path, problem=problem)


def _check_towers(
    model: nn.Module, signature: Signature, inputs: dict[str, Tensor], score: Tensor, path: str
) -> None:
    """Raise ``ModelRefused`` if a tower fails or the towers' dot product is not the score."""
    vectors: dict[str, Tensor] = {}
    towers = signature.towers.named() if signature.towers is not None else {}
    graphs = [(graph, name) for graph in served_graphs(signature) for name in graph.towers]
    for graph, name in graphs:
        try:
            with torch.no_grad():
                vector = tower_vectors(model, inputs, signature, name)
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            raise ModelRefused(
                "tower_fails",
                architecture=path,
                tower=name,
                module=towers[name].path,
                inputs=tuple(input_names(graph.signature)),
                problem=repr(fault),
            ) from fault
        shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        if not isinstance(vector, Tensor) or vector.dim() != 2 or len(vector) != ROWS:
            raise ModelRefused(
                "tower_vector_shape",
                architecture=path,
                tower=name,
                module=towers[name].path,
                rows=ROWS,
                got=str(shape),
            )
        vectors[name] = vector
    if vectors["query"].shape != vectors["item"].shape:
        raise ModelRefused(
            "tower_lengths_differ",
            architecture=path,
            query=vectors["query"].shape[1],
            item=vectors["item"].shape[1],
        )
    product = (vectors["query"] * vectors["item"]).sum(dim=1)
    # The sigmoid increases, so it ranks the catalogue as the product does.
    gaps = [float((scores - score).abs().max()) for scores in (product, product.sigmoid())]
    if not min(gaps) <= TOWER_TOLERANCE * (1 + float(score.abs().max())):
        raise ModelRefused("towers_not_the_score", architecture=path, gap=gaps[0])
