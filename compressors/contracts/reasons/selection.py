"""Reasons why a step selects or skips a unit, or changes nothing.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

Most sentences follow the name of a unit, as in "user: has 5 rows, fewer than min_rows 100". A field
``fault`` is the message of an error; a field ``why`` contains other reasons.
"""

SENTENCES = {
    "as_written": "{text}",  # a sentence stored by an earlier version, without a code
    "selected": "{step} as ordered",
    "already_stored": "already {format}",
    "shares_weight": "shares its weight with {unit}",
    "custom_forward": "{module_class} has a forward method that differs from its base class",
    "has_hooks": "has forward hooks, which the module that replaces it would not have",
    "not_matched": "not among {patterns}",
    "too_few_rows": "has {rows} rows, fewer than min_rows {min_rows}",
    "not_smaller": "{step} would take {bytes} bytes, but it takes only {present} now",
    "wrong_role": "{step} does not apply to a {role}",
    "skipped": "skipped by {step}: {why}",
    # ``core/skipping.py`` runs a failing step on some units only, to find those on which it fails.
    # The other units have this reason.
    "not_tried": "not tried",
    "not_servable": "{fault}",  # no target could serve the result for this unit
    "step_failed": "{fault}",  # the step raised an error for this unit
    # Supported ways in which forward code reads the weight of a table directly. The plan line of
    # the compressed table has these reasons.
    "rows_read": "forward code also reads rows of its weight",
    "weight_multiplied": "forward code multiplies by its weight, which reads all rows",
    "weight_decoded": "forward code reads its whole weight, which is decoded at each call",
    # Why a step cannot replace a unit: forward code uses it in a way that is not supported.
    "not_multiplied": "forward code multiplies by its weight, which {format} does not support",
    "weight_read": "forward code reads it without calling it ({error}: {message})",
    "attributes_read": "forward code reads its attributes, which the replacement does not have",
    "kept_format": "kept {format}",
    "nothing_better": "unchanged, because the step found nothing better",
    "part_of": "a part of {unit}",
    "outside_units": "norms, biases outside dense layers, buffers",  # the line of other tensors
    "folded_norms": "{count} of the norms became part of a layer: {norms}",
    "many_folded_norms": "{count} of the norms became part of a layer: {norms} and more",
    "unit_skipped": "{step} skipped {unit!r}: {why}",
    "step_changed_nothing": "{step} changed nothing: {why}",
    "step_found_nothing": "{step} changed nothing, because it found nothing better",
    "training_changed_nothing": "The training of {step} changed nothing: {why}",
}
