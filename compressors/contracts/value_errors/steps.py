"""Sentences about settings of steps that do not fit each other."""

SENTENCES = {
    "min_lookups_without_traffic": "min_lookups counts lookups, so it needs importance 'traffic', "
    "got {importance!r}. Remove one of the two.",
    "qat_trains_tables": "qat trains no tables; train them before, with fine_tune or distill",
    "soft_share_without_training": "soft_share needs training: nothing is trained without it",
    "traffic_without_labels": "rows 'traffic' have no labels to mix in: set soft_share to 1",
    "auxiliary_without_labels": "with 'auxiliary' the output learns from labels: lower soft_share",
    "temperature_of_margin": "temperature changes nothing about loss 'margin': leave it out",
    "nothing_to_train": "without dense layers only tables can learn: set training.tables",
    "student_without_dense": "a student's dense layers are initialized again: leave 'dense' true",
}
