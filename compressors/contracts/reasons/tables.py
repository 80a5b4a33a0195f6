"""Sentences about embedding tables."""

SENTENCES = {
    "better_format": (
        "stored as {format}, which is better and takes {bytes:,} bytes: {step} would take "
        "{step_bytes:,} for {rows:,} x {dim}"
    ),
    "other_format_smaller": "{format} would take {bytes:,} bytes, not {step_bytes:,}",
    "not_a_table": "a tensor of shape ({shape}) and type {dtype} is no table",
    "not_smaller_composed": "{rows} x {dim} would be no smaller: {before} -> {after} bytes",
    "no_codes": "{format} has no codes",
    "narrower_rows": "{dim} -> {rank} numbers a row",
    "kept_dimensions": "{kept} of {dim} dimensions stay, by {importance}; form low_rank",
    "hashed_rows": "{buckets} rows, {hashes} of them a row",
    "signed_hashed_rows": "{buckets} rows, {hashes} of them a row, with signs",
    "too_many_rows": "{rows} rows, and the hash functions are for fewer than {limit}",
    "quotient_and_remainder": "{quotients} and {buckets} rows, operation {operation}",
    "decoded_codes": "{dim} -> {codes} numbers a row, decoder with {hidden} hidden units",
    "too_short_for_decoder": "{rows} x {dim} is too short for a decoder of codes of {codes}",
    "hot_rows": "{hot:,} of {rows:,} rows are hot",
    "hot_lookups": "hot rows get {share:.2%} of the lookups",
    "clustered_rows": "{hot:,} of {rows:,} rows stay, the others share {clusters:,}",
    "shared_lookups": "{share:.2%} of the lookups get a shared row",
    "rows_by_lookups": "{step}: rows stay that training looks up at least {min_lookups} times",
    "kept_rows": "{kept:,} of {rows:,} rows stay, by {importance}",
    "kept_rows_by_lookups": (
        "{kept:,} of {rows:,} rows stay, looked up at least {min_lookups} times"
    ),
    "composed": "{step}: {what}",
    "pruned_lookups": "{share:.2%} of the lookups get another row",
    "row_map_too_large": "a map of rows would cost more than it saves",
    "merged_within": "{step}: within {within:g} of a row's length",
    "merged_equal": "{step}: equal rows",
    "merged_rows": "{rows:,} -> {unique:,} rows",
    "dropped_if": "{step}: if {metric} falls by at most {most_loss:g}",
    "table_dropped": "dropped, {metric} {change:+.5f} with all dropped so far",
    "table_kept": "stays, {metric} {change:+.5f} without it",
}
