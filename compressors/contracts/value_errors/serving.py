"""Sentences about the profiles of engines and about models of a Triton repository."""

SENTENCES = {
    "target_not_in_triton": "Triton cannot serve target {target!r}; it serves {targets}",
    "profile_ranks_differ": "profile of {input!r} mixes shapes of different rank",
    "profile_order": "profile of {input!r} needs 0 <= low <= best <= high",
    "batches_shrink": "batches must not shrink; found {got!r}",
    "tensor_type_unknown": "{tensor!r} is {dtype}; Triton gets {dtypes!r}",
}
