"""Reasons about steps on embedding tables: their formats, sizes and removed rows.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

Hot rows are those with the most lookups. A hashed table has fewer rows ("buckets") than ids;
several hash functions ("hashes") select rows for an id, and these are combined. Codes are the
numbers that a format stores for a row and decodes: integers, such as indices into a codebook, or
the inputs of a decoder network. ``operation`` is how the row of an id's quotient and the row of its
remainder are combined. A shared row is one that replaces several similar rows. "Form low_rank"
means that a table is stored like the result of step ``low_rank``: narrower rows, and a matrix that
maps them to the full width.
"""

SENTENCES = {
    "better_format": (
        "stored as {format}, which is better and takes {bytes:,} bytes: {step} would take "
        "{step_bytes:,} for {rows:,} x {dim}"
    ),
    "one_scale": "one scale for all rows, error {error:.2%} of the weights",
    "one_scale_inexact": (
        "a scale for each row: with one scale for all rows, the error would be {error:.2%} of the "
        "weights, more than {most:.2%}"
    ),
    "other_format_smaller": "{format} would take {bytes:,} bytes, not {step_bytes:,}",
    "not_a_table": "a tensor of shape ({shape}) and type {dtype} is not a table",
    "not_smaller_composed": "{rows} x {dim} would not be smaller: {before} -> {after} bytes",
    "no_codes": "format {format} has no codes",
    "narrower_rows": "{dim} -> {rank} numbers per row",
    "kept_dimensions": "keeps {kept} of {dim} dimensions, by {importance}; form low_rank",
    "hashed_rows": "{buckets} rows, of which {hashes} are combined for each id",
    "signed_hashed_rows": "{buckets} rows, of which {hashes} are combined with signs for each id",
    "too_many_rows": "has {rows} rows, but the hash functions support fewer than {limit}",
    "quotient_and_remainder": "{quotients} and {buckets} rows, operation {operation}",
    "decoded_codes": "{dim} -> {codes} numbers per row, decoder with {hidden} hidden units",
    "too_short_for_decoder": "{rows} x {dim} has too few rows for a decoder of codes of {codes}",
    "hot_rows": "{hot:,} of {rows:,} rows are hot",
    "hot_lookups": "hot rows get {share:.2%} of the lookups",
    "clustered_rows": "keeps {hot:,} of {rows:,} rows, the others share {clusters:,}",
    "shared_lookups": "{share:.2%} of the lookups get a shared row",
    "rows_by_lookups": "{step}: keeps rows that training data looks up at least "
    "{min_lookups} times",
    "kept_rows": "keeps {kept:,} of {rows:,} rows, by {importance}",
    "kept_rows_by_lookups": "keeps {kept:,} of {rows:,} rows, looked up at least "
    "{min_lookups} times",
    "composed": "{step}: {what}",
    "pruned_lookups": "{share:.2%} of the lookups get another row",
    "row_map_too_large": "the map from ids to kept rows would take more bytes than it saves",
    "merged_within": "{step}: rows closer than {within:g} times the root mean square length",
    "merged_equal": "{step}: equal rows",
    "merged_rows": "{rows:,} -> {unique:,} rows",
    "dropped_if": "{step}: dropped if {metric} falls by at most {most_loss:g}",
    "table_dropped": "dropped, {metric} {change:+.5f} with all dropped so far",
    "table_kept": "kept, {metric} {change:+.5f} without it",
}
