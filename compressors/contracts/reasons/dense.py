"""Reasons about steps that change the format of dense layers: int8, floats, low rank.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces; ``{name:,}`` joins a list with commas.
The list ``widest`` of ``mixed_input_ranges`` has reasons with the code ``channel_range``.

A low-rank layer has two factors, of shapes (inputs, rank) and (rank, outputs). GPTQ rounds weights
one after the other and corrects the remaining ones. A level is one value of a quantized number. The
headroom is the factor by which inputs of served rows may exceed the calibration rows' inputs. The
output error of a layer is the root mean square of the changes of its outputs on the calibration
rows, divided by the root mean square of the outputs. The setting ``most_error`` is its largest
allowed value for int8; for low rank, it is the share of the outputs' squared size that may be lost.
The sums of a float16 layer are its outputs: sums of products of inputs and weights. ``start`` lists
how the initial codes of quantization-aware training were chosen.

``what`` is "an input" or "a sum". ``rank_not_smaller`` is for a rank from the settings,
``found_rank_not_smaller`` for one that the step computed. ``coarse`` is the number of input
channels that keep few levels. ``step`` in ``above_most_error`` is the format that the layer would
have.
"""

SENTENCES = {
    "beyond_largest": "has a value of {largest:g}, beyond the largest number of "
    "{format}, {limit:.6g}",
    "near_largest": (
        "{what} of {size:g} on the calibration rows, times headroom {headroom:g}, is "
        "beyond the largest number of {format}, {limit:.6g}"
    ),
    "sums_not_checked": "the size of its sums was not checked, because there are no "
    "calibration rows",
    "gptq_error": "gptq reduces the output error to {share:.0%} of that of nearest rounding",
    "zero_inputs": "all its inputs are zero on the calibration rows, so their range is unknown",
    "calibrated_range": "input range chosen by {calibrator}",
    "output_error": "output error {share:.2%} of the root mean square",
    "above_most_error": "as {step}, this would exceed most_error {most_error:g}",
    "training_start": "training started with {start}",
    "rank_searched": (
        "{step}: the smallest rank up to {rank} that loses at most {most_error:g} of "
        "the outputs' squared size"
    ),
    "no_smaller_rank": "{inputs} -> {outputs} would not be smaller in any rank",
    "factorized": "{step}: {inputs} -> {rank} -> {outputs}",
    "rank_not_smaller": "in rank {rank} it would not be smaller: {before} -> {after} weights",
    "found_rank_not_smaller": "in rank {rank} it would not be smaller",
    "rank_loss": "rank {rank} loses {share:.1%} of the outputs' squared size",
    "mixed_input_ranges": (
        "inputs of very different range share one scale: the range is {range:.3g} "
        "overall, but {least_range:.3g} to {largest_range:.3g} in {coarse} of "
        "{channels} input channels, which keep {least_levels:.1f} to {most_levels:.1f} "
        "levels; their rounding alone changes the layer's output by {error:.1%} of its "
        "standard deviation. Widest channels: {widest:,}. Use 'static_int8' with "
        "'input_scales': 'channel' for this layer, scale or normalize these inputs, run "
        "'equalize' or 'smooth_quant' before this step, or leave the layer out of 'layers'"
    ),
    "reads_codes_of_tables": "reads int8 tables: its inputs have the scales of these tables",
    "channel_range": "{channel} (up to {largest:.3g})",
}
