"""Problems with the labels of a bundle, and with the scores of its uncompressed model.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

``optional_group_labels_equal`` is for a group column that the signature's metric does not need.
``entropy`` is the log loss of the constant prediction ``rate``, the mean label.
"""

SENTENCES = {
    "interactions_missing": "Expected interactions with a label above 0 in split {split!r}, got "
    "none in {rows:,} rows, so retrieval cannot be evaluated. Check column {column!r}",
    "labels_missing": "Expected rows with a label of output {output!r} in split {split!r}, got "
    "{rows:,} rows of which none has 1 in column {column!r}, which 'label_where' names. Check this "
    "column, or how the split was drawn",
    "problem_of_output": "Output {output!r}: {problem}",
    "labels_equal": "Expected rows with different labels in split {split!r}, got {rows:,} rows "
    "that all have label {label:g}: no metric can distinguish models. Check column {column!r}, or "
    "how the split was drawn",
    "group_labels_equal": "Expected a group with different labels in split {split!r} for "
    "{metrics}, got none: within each value of {group!r} all labels are equal. Name another group "
    "column",
    "optional_group_labels_equal": "Expected a group with different labels in split {split!r} for "
    "{metrics}, got none: within each value of {group!r} all labels are equal. Name another group "
    "column, or remove it",
    "scores_not_finite": "Expected a finite score for every test row, got none for {count:,} of "
    "{rows:,} rows. Check ids and dense inputs of these rows, and the weights",
    "scores_equal": "The model gives all {rows:,} sampled test rows the same score {score:g}. "
    "Check that the trained weights were saved, and the inputs",
    "probability_outside": "Expected output 'probability' in [0, 1], got {count:,} of {rows:,} "
    "sampled test rows outside, such as {score:g}. Set output to 'logit', or apply the sigmoid in "
    "forward",
    "output_misdeclared": "Expected output {declared!r}, got scores that fit output {fitting!r}: "
    "all of {rows:,} sampled test rows lie in [0, 1], and their log loss is {fitting_loss:.4f} as "
    "{fitting} and {declared_loss:.4f} as {declared}. Set output to {fitting!r}",
    "worse_than_base_rate": "The model's log loss {loss:.4f} on {rows:,} sampled test rows is "
    "worse than {entropy:.4f}, which predicting the mean label {rate:.4f} for every row reaches. "
    "Check the labels, and whether the model is calibrated (a model trained on sampled negatives "
    "is not)",
    "worse_than_chance": "The model's AUC {auc:.4f} on {rows:,} sampled test rows is worse than "
    "chance (0.5). Check that label 1 is the positive class and that a higher score means more "
    "likely",
    "worse_than_random_order": "The model's NDCG@10 {ndcg:.4f} on {groups:,} sampled test groups "
    "is worse than the {random:.4f} of a random order. Check that a higher label is more relevant "
    "and that a higher score ranks first",
}
