"""Sentences about formats of dense layers."""

SENTENCES = {
    "beyond_largest": "has a value of {largest:g}, beyond the largest of {format}, {limit:.6g}",
    "near_largest": (
        "{what} of {size:g} on the calibration rows, times headroom {headroom:g}, is beyond the "
        "largest of {format}, {limit:.6g}"
    ),
    "sums_not_checked": "its sums were not checked: there are no calibration rows",
    "gptq_error": "gptq leaves {share:.0%} of the error of outputs",
    "zero_inputs": (
        "all its inputs were zero on the calibration rows, so they have no range to scale by"
    ),
    "calibrated_range": "range by {calibrator}",
    "output_error": "output off by {share:.2%} of its root mean square",
    "above_most_error": "as {step} this is above most_error {most_error:g}",
    "training_start": "training started with {start}",
    "rank_searched": "{step}: loses at most {most_error:g}, in rank {rank} or less",
    "no_smaller_rank": "{inputs} -> {outputs} is no smaller in any rank",
    "factorized": "{step}: {inputs} -> {rank} -> {outputs}",
    "rank_not_smaller": "in rank {rank} it would be no smaller: {before} -> {after} weights",
    "found_rank_not_smaller": "rank {rank} would be no smaller",
    "rank_loss": "rank {rank} loses {share:.1%} of the outputs' squared size",
    "mixed_input_ranges": (
        "inputs of very different range share one scale: the range is {range:.3g} overall, but "
        "{least_range:.3g} to {largest_range:.3g} in {coarse} of {channels} input channels, which "
        "keep {least_levels:.1f} to {most_levels:.1f} levels; their rounding alone changes the "
        "layer's output by {error:.1%} of its standard deviation. Widest channels: {widest:,}. "
        "Scale or normalize these inputs, run 'equalize' or 'smooth_quant' before this step, or "
        "leave the layer out of 'layers'"
    ),
    "channel_range": "{channel} (up to {largest:.3g})",
}
