"""Sentences about orders and about the rules that their data must satisfy."""

SENTENCES = {
    "steps_missing": "preset 'custom' needs steps",
    "steps_with_preset": "steps need preset 'custom'; found preset {preset!r}",
    "recalibrate_not_last": "step 'recalibrate' fits a map to the network as it then is, and "
    "{step!r} comes after it: put one 'recalibrate' at the end",
    "batch_sizes_shrink": "batch sizes must not shrink from smallest to best to largest",
    "target_unknown": "there is no target {target!r}; there are {known}",
    "targets_off": "an order needs at least one target that is not 'off'",
    "min_rows_not_positive": "min_rows needs at least 1 row: nothing can be said of none",
    "label_rate_order": "label_rate needs 0 <= low <= high <= 1; found {got!r}",
}
