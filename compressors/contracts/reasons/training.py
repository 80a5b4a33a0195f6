"""Reasons about steps that train, refit or recalibrate a network.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

Traffic is the logged requests, which have no labels. A map is the function that recalibrates the
network's output; ``method`` is the selected kind of such a function. ``refit_codes`` trains the
codebooks of tables and selects new codes (indices into them): ``refitted`` is its reason for a
table, ``trained_with_codes`` for a dense layer that is trained at the same time.
"""

SENTENCES = {
    "trained_on_rows": "{step} on {rows:,} rows",
    "trained_on_traffic": "{step} on {traffic:,} rows of traffic without labels",
    "trained_on_both": "{step} on {rows:,} rows and {traffic:,} rows of traffic without labels",
    "several_teachers": "with the predictions of {teachers} teachers",
    "not_in_student": "the student does not have this unit",
    "smaller_in_student": "{before} -> {after} in the student",
    "tables_not_trained": "{step} does not train tables",
    "dense_not_trained": "{step} does not train dense layers",
    "trains_float32_only": (
        "{step} trains only float32 tensors, and the {tensor} of {format} is {dtype}"
    ),
    "nothing_to_train": "{format} has no tensor that {step} can train",
    "training_unchanged": "no epoch of {epochs} was better than the start",
    "trained_to_epoch": (
        "epoch {epoch} of the training is used, {metric} {before:.5f} -> {after:.5f} "
        "on validation rows"
    ),
    "still_rising": "the metric still improved in the last epoch",
    "trained_with_codes": "{step}: trained together with the tables",
    "refitted": "{step} in {rounds} rounds",
    "no_better_map": (
        "{step}: no map lowers the log loss of {loss:.5f} on rows that it was not fitted to"
    ),
    "output_mapped": "{method}: log loss {before:.5f} -> {after:.5f} on {rows:,} validation rows",
}
