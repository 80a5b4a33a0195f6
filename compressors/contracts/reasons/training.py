"""Sentences about training."""

SENTENCES = {
    "trained_on_rows": "{step} on {rows:,} rows",
    "trained_on_traffic": "{step} on {traffic:,} rows of traffic",
    "trained_on_both": "{step} on {rows:,} rows and {traffic:,} rows of traffic",
    "several_teachers": "taught by {teachers} models",
    "not_in_student": "not in the student",
    "smaller_in_student": "{before} -> {after} in the student",
    "tables_not_trained": "{step} leaves tables as they are",
    "dense_not_trained": "{step} leaves dense layers as they are",
    "trains_float32_only": "{step} trains only float32, and the {tensor} of {format} is {dtype}",
    "nothing_to_train": "{format} has no tensor that {step} can train",
    "training_unchanged": "no epoch of {epochs} was better than the start",
    "trained_to_epoch": (
        "trained to epoch {epoch}, {metric} {before:.5f} -> {after:.5f} on validation rows"
    ),
    "still_rising": "still rising in the last epoch",
    "trained_with_codes": "{step}: trained with the codes",
    "refitted": "{step} in {rounds} rounds",
    "no_better_map": ("{step}: no map is better than {loss:.5f} on rows it was not fitted to"),
    "output_mapped": "{method}: log loss {before:.5f} -> {after:.5f} on {rows:,} validation rows",
}
