"""Faults in table formats: rounding, scales, clipping, and the selection of a format.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
A grid is the set of levels to which the weights of a row are rounded. Rows may share a scale.
"""

from tests.seeded_faults.fault import Fault

ROWWISE = "tests/compressors/quantize/test_rowwise.py"
STORED = f"{ROWWISE}::test_stored_codes_scales_and_offsets_equal_the_numpy_reference"
GRID = "tests/compressors/quantize/test_levels.py"
CLIPPING = "tests/compressors/quantize/test_clipping.py"
BETTER = "tests/compressors/quantize/test_better_format.py"

FAULTS = (
    Fault(
        id="grid-ties-go-up",
        file="compressors/quantize/kernels/levels.py",
        old="multiples = multiples.round() if grid.levels % 2 else multiples.floor() + 0.5",
        new="multiples = (multiples + 0.5).floor() if grid.levels % 2 else multiples.floor() + 0.5",
        effect="Weights halfway between two levels are rounded up instead of to the even level.",
        tests=(
            "tests/compressors/quantize/test_kernels.py"
            "::test_ties_between_levels_are_rounded_as_in_the_specification",
        ),
    ),
    Fault(
        id="grid-int2-levels-shifted",
        file="compressors/quantize/kernels/levels.py",
        old="else multiples.floor() + 0.5",
        new="else multiples.round() - 0.5",
        effect="Symmetric int2 rounds half of the weights to the level below the nearest one.",
        tests=(STORED,),
    ),
    Fault(
        id="grid-scale-rounded-down",
        file="compressors/quantize/kernels/levels.py",
        old="return torch.where(clipped, stored + smallest, stored)",
        new="return stored",
        effect="A small float16 scale is rounded down, which clips the row's largest weights.",
        tests=(f"{GRID}::test_scales_of_the_smallest_float16_numbers_clip_nothing",),
    ),
    Fault(
        id="grid-scale-may-be-zero",
        file="compressors/quantize/kernels/levels.py",
        old="stored = scale.clamp(min=smallest).to(grid.dtype)",
        new="stored = scale.to(grid.dtype)",
        effect="A row of zeros has scale 0, which TensorRT rejects.",
        tests=(
            f"{GRID}::test_rows_of_zeros_have_a_positive_scale_and_are_exact_if_a_level_is_zero",
        ),
    ),
    Fault(
        id="grid-offset-rounded-to-nearest",
        file="compressors/quantize/kernels/levels.py",
        old="offset = torch.where(rounded.float() > low, below, rounded)",
        new="offset = rounded",
        effect="An offset above the smallest weight clips that weight.",
        tests=(f"{GRID}::test_a_row_of_equal_values_changes_only_by_rounding",),
    ),
    Fault(
        id="grid-symmetric-scale-of-one-end",
        file="compressors/quantize/kernels/clipping.py",
        old="        widest = symmetric_scale(torch.maximum(-low, high), grid)\n"
        '        if grid.clipping == "min_max":',
        new="        widest = symmetric_scale(high.abs(), grid)\n"
        '        if grid.clipping == "min_max":',
        effect="The scale ignores negative weights that are larger than the positive ones.",
        tests=(STORED,),
    ),
    Fault(
        id="grid-asymmetric-top-level-unused",
        file="compressors/quantize/kernels/levels.py",
        old="    top = grid.levels - 1\n    scale = (high",
        new="    top = grid.levels\n    scale = (high",
        effect="The highest code of an asymmetric grid is never used, so levels are too narrow.",
        tests=(STORED,),
    ),
    Fault(
        id="int8-asymmetric-has-255-levels",
        file="compressors/quantize/tables/rowwise_int8.py",
        old="levels: ClassVar[tuple[int, int]] = (255, 256)",
        new="levels: ClassVar[tuple[int, int]] = (255, 255)",
        effect="Row-wise int8 with offsets wastes a code, against the documented formula.",
        tests=(STORED,),
    ),
    Fault(
        id="int8-symmetric-has-253-levels",
        file="compressors/quantize/tables/rowwise_int8.py",
        old="levels: ClassVar[tuple[int, int]] = (255, 256)",
        new="levels: ClassVar[tuple[int, int]] = (253, 256)",
        effect="Symmetric row-wise int8 uses 253 of its 255 levels.",
        tests=(STORED,),
    ),
    Fault(
        id="shared-scale-always-the-first",
        file="compressors/quantize/tables/scales.py",
        old="return ids // rows_per_scale if rows_per_scale else torch.zeros_like(ids)",
        new="return (ids % rows_per_scale).clamp(max=0) if rows_per_scale "
        "else torch.zeros_like(ids)",
        effect="All rows of a table with shared scales are read with the first scale.",
        tests=(f"{ROWWISE}::test_lookup_returns_the_reference_weights_for_ids_of_any_shape",),
    ),
    Fault(
        id="shared-scale-layout-drops-last-range",
        file="compressors/quantize/tables/scales.py",
        old="count = -(-rows // rows_per_scale) if rows_per_scale else 1",
        new="count = max(rows // rows_per_scale, 1) if rows_per_scale else 1",
        effect="The plan's bytes omit the scale of the last, shorter range of rows.",
        tests=(f"{ROWWISE}::test_stored_bytes_are_the_bytes_of_codes_scales_and_offsets",),
    ),
    Fault(
        id="scale-gradient-ignores-repeated-ids",
        file="compressors/quantize/tables/scales.py",
        old="total.index_add_(0, scale_indices(ids, rows_per_scale).reshape(-1), by_lookup)",
        new="total[scale_indices(ids, rows_per_scale).reshape(-1)] = by_lookup",
        effect="The gradient of a scale counts only one of several lookups of a row.",
        tests=(f"{ROWWISE}::test_gradients_of_scales_and_offsets_equal_plain_torch",),
    ),
    Fault(
        id="clipping-mse-takes-narrowest-range",
        file="compressors/quantize/kernels/clipping.py",
        old="better = (error < least_error) & (scale > 0)",
        new="better = scale > 0",
        effect="Clipping takes the narrowest range instead of the one of least squared error.",
        tests=(f"{CLIPPING}::test_mse_finds_the_best_share_of_every_symmetric_row",),
    ),
    Fault(
        id="clipping-greedy-moves-one-end",
        file="compressors/quantize/kernels/clipping.py",
        old="        moves_low = low_error < high_error\n",
        new="        moves_low = low_error == low_error\n",
        effect="Greedy clipping always moves the lower end.",
        tests=(f"{CLIPPING}::test_greedy_error_is_within_2_percent_of_torchs_implementation",),
    ),
    Fault(
        id="float8-scale-ends-below-448",
        file="compressors/quantize/tables/float8_e4m3.py",
        old="LEVELS = 2 * LARGEST + 1",
        new="LEVELS = LARGEST + 1",
        effect="The largest weight of a row is stored as 224: half of the numbers are unused.",
        tests=("tests/compressors/quantize/test_float8_e4m3.py",),
    ),
    Fault(
        id="bfloat16-truncates",
        file="compressors/quantize/tables/bfloat16.py",
        old="short = table.to(torch.bfloat16)",
        new="short = (table.float().contiguous().view(torch.int32) >> 16 << 16)"
        ".view(torch.float32).to(torch.bfloat16)",
        effect="Weights are truncated to bfloat16 instead of rounded.",
        tests=("tests/compressors/quantize/test_bfloat16.py",),
    ),
    Fault(
        id="better-format-ignores-bytes",
        file="compressors/quantize/better_format.py",
        old="sorted((item for item in better if item[0] <= size), key=lambda item: item[:2])",
        new="sorted(better, key=lambda item: item[:2])",
        effect="A row-wise table is replaced by a better format that needs more bytes.",
        tests=(f"{BETTER}::test_best_format_selects_the_most_precise_format_that_is_no_larger",),
    ),
    Fault(
        id="better-format-overflows-float16",
        file="compressors/quantize/better_format.py",
        old='if other.kind == "float16" and float(weight.abs().max()) > LARGEST_FLOAT16:',
        new='if other.kind == "none" and float(weight.abs().max()) > LARGEST_FLOAT16:',
        effect="A table with weights beyond float16 is stored as float16, with infinite weights.",
        tests=(f"{BETTER}::test_a_table_beyond_float16_is_stored_in_an_integer_format",),
    ),
)
