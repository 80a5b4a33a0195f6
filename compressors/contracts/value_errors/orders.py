"""Messages of errors in orders and in the rules that the order's data must satisfy.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``.
``value_error`` in ``coded.py`` creates the error and fills in the fields in braces.

An order is a request to compress a model by a list of steps, or by a preset (a named list of steps;
``custom`` means that the order lists them). A data rule is a check of the order's data.
``label_rate`` is the allowed range, ``low`` to ``high``, of the share of positive labels;
``min_rows`` is the smallest number of rows of a split.
"""

SENTENCES = {
    "steps_missing": "preset 'custom' needs steps",
    "steps_with_preset": "steps need preset 'custom', got preset {preset!r}",
    "recalibrate_not_last": (
        "step 'recalibrate' fits a map of scores for the network at that point of the recipe, "
        "but {step!r} follows it: put one 'recalibrate' at the end"
    ),
    "batch_sizes_shrink": "expected smallest <= best <= largest batch size",
    "target_unknown": "unknown target {target!r}; use one of {known}",
    "targets_off": "an order needs at least one target that is not 'off'",
    "min_rows_not_positive": "min_rows must be at least 1",
    "label_rate_order": "label_rate needs 0 <= low <= high <= 1, got {got!r}",
}
