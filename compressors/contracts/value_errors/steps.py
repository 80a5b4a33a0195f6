"""Messages of errors in settings of a step that contradict each other.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``.
``value_error`` in ``coded.py`` creates the error and fills in the fields in braces.

Settings of steps that train: ``soft_share`` is the weight of the teacher's predictions in the loss,
and the labels get the rest; ``rows`` selects the training rows; ``auxiliary`` names the layer whose
output an auxiliary head reads in training; ``training`` contains epochs, learning rate and others.
``training.tables`` and ``training.dense`` set what is trained. ``qat`` is quantization-aware
training.
"""

SENTENCES = {
    "min_lookups_without_importance": (
        "min_lookups counts lookups, so it needs importance 'lookups', got {importance!r}. Remove "
        "one of the two."
    ),
    "one_scale_needs_symmetric_rows": (
        "one_scale_error chooses between one scale for all rows and one for each row, with levels "
        "around zero: set symmetric to true and rows_per_scale to 1"
    ),
    "qat_trains_tables": (
        "qat does not train tables; train them in an earlier step, with fine_tune or distill"
    ),
    "soft_share_without_training": "soft_share needs training, but training is not set",
    "traffic_without_labels": (
        "rows 'traffic' are logged requests without labels: set soft_share to 1"
    ),
    "auxiliary_without_labels": (
        "with 'auxiliary', the output must learn from labels: set soft_share below 1, and do not "
        "set rows to 'traffic'"
    ),
    "temperature_of_margin": "temperature has no effect on loss 'margin': leave it out",
    "nothing_to_train": (
        "dense layers are not trained, so tables must be trained: set training.tables"
    ),
    "student_without_dense": (
        "a student's dense layers are initialized again and must be trained: leave 'dense' true"
    ),
}
