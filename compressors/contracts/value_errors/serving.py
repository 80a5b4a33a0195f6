"""Sentences about the profiles of engines and about models of a Triton repository."""

SENTENCES = {
    "target_not_in_triton": "Triton cannot serve target {target!r}; it serves {targets}",
    "profile_ranks_differ": "the shapes in the profile of {input!r} have different numbers "
    "of dimensions",
    "profile_order": "profile of {input!r} needs 0 <= low <= best <= high",
    "batches_shrink": "expected batch sizes in ascending order, got {got!r}",
    "tensor_type_unknown": "{tensor!r} has type {dtype}; Triton supports {dtypes!r}",
}
