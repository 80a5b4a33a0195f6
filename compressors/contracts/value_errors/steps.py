"""Sentences about settings of steps that do not fit each other."""

SENTENCES = {
    "min_lookups_without_traffic": "min_lookups counts lookups, so it needs importance 'traffic', "
    "got {importance!r}. Remove one of the two.",
    "qat_trains_tables": (
        "qat does not train tables; train them in an earlier step, with fine_tune or distill"
    ),
    "soft_share_without_training": "soft_share needs training, but training is not set",
    "traffic_without_labels": "rows 'traffic' have no labels: set soft_share to 1",
    "auxiliary_without_labels": "with 'auxiliary' the output must learn from labels: lower "
    "soft_share",
    "temperature_of_margin": "temperature has no effect on loss 'margin': leave it out",
    "nothing_to_train": "if dense layers are not trained, tables must be: set training.tables",
    "student_without_dense": (
        "a student's dense layers are initialized again and must be trained: leave 'dense' true"
    ),
}
