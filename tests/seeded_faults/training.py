"""Faults in distillation, pruning, calibration, training, and checks of data and models.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
The level of a list is the mean of its scores, its margins are the differences between its scores.
The isotonic map is the function that the step ``recalibrate`` fits to the scores and their labels.
"""

from tests.seeded_faults.fault import Fault

LOSS = "tests/compressors/task_kinds/test_loss.py"
DISTILL = "tests/compressors/distill/test_distill_losses.py"
CALIBRATION = "tests/compressors/quantize/test_calibration.py"
SPARSE = "tests/compressors/prune/test_sparse_2_4.py"
PRUNE = "tests/compressors/prune/test_prune_rows.py"
RECALIBRATE = "tests/compressors/distill/test_recalibrate.py"
BASELINE = "tests/compressors/metrics/test_baseline_checks.py"
DATA = "tests/infra/test_splits.py"

FAULTS = (
    Fault(
        id="soft-loss-temperature-of-student-only",
        file="compressors/task_kinds/ctr.py",
        old="target = torch.sigmoid(teacher / temperature)",
        new="target = torch.sigmoid(teacher)",
        effect="The teacher's probabilities are not softened by the temperature.",
        tests=(f"{LOSS}::test_soft_loss_of_clicks_is_the_cross_entropy_at_the_temperature",),
    ),
    Fault(
        id="hard-loss-linear-gains",
        file="compressors/task_kinds/ranking.py",
        old="gains = torch.exp2(batch.label.to(torch.float32)) - 1\n",
        new="gains = batch.label.to(torch.float32)\n",
        effect="The ranking loss has linear gains instead of 2^label - 1.",
        tests=(f"{LOSS}::test_losses_of_lists_are_mean_cross_entropies_of_softmax_shares",),
    ),
    Fault(
        id="margin-loss-counts-the-level",
        file="compressors/distill/losses.py",
        old="    squares = sum_by_list((difference - mean[list_index]).square(), list_index, num_lists)\n",
        new="    squares = sum_by_list(difference.square(), list_index, num_lists)\n",
        effect="The margin loss depends on the level of a list, not on its margins.",
        tests=(f"{DISTILL}::test_margin_loss_is_the_mean_over_all_pairs_of_each_list",),
    ),
    Fault(
        id="rankdistil-places-reversed",
        file="compressors/distill/losses.py",
        old="    by_score = teacher.argsort(descending=True, stable=True)\n",
        new="    by_score = teacher.argsort(stable=True)\n",
        effect="RankDistil matches the order of the teacher's last rows instead of its first.",
        tests=(f"{DISTILL}::test_rankdistil_gradient_orders_the_top_and_keeps_other_rows_below",),
    ),
    Fault(
        id="calibration-percentile-without-zeros",
        file="compressors/quantize/calibration/calibrators.py",
        old="    below = histogram.zeros + histogram.counts.cumsum(0)\n",
        new="    below = histogram.counts.cumsum(0)\n",
        effect="The percentile of inputs ignores zeros, so the clipping threshold is wrong.",
        tests=(
            f"{CALIBRATION}::test_percentile_is_the_smallest_bin_edge_with_its_share_of_values_inside",
        ),
    ),
    Fault(
        id="calibration-histogram-forgets-when-it-grows",
        file="compressors/quantize/calibration/calibrators.py",
        old="        self.counts[: len(merged_counts)] = merged_counts\n",
        new="",
        effect="Counts from before a larger value are lost.",
        tests=(
            f"{CALIBRATION}::test_histogram_does_not_depend_on_how_rows_are_split_into_batches",
        ),
    ),
    Fault(
        id="int8-products-exceed-sixteen-bits",
        file="compressors/quantize/dense/int8_codes.py",
        old="    pair_scale = torch.maximum(scale, paired_scale(clipped.detach()))\n",
        new="    pair_scale = scale\n",
        effect="Int8 products clip on processors without VNNI.",
        tests=(
            "tests/compressors/quantize/test_static_int8.py"
            "::test_the_sum_of_two_neighbouring_products_fits_in_16_bits",
        ),
    ),
    Fault(
        id="int8-op-sums-in-float32",
        file="compressors/quantize/dense/static_int8.py",
        old="    exact = torch.float32 if codes.shape[1] <= EXACT_INPUTS else torch.float64\n",
        new="    exact = torch.float32\n",
        effect="Products of more than 1024 inputs are summed inexactly.",
        tests=(
            "tests/compressors/quantize/test_static_int8.py"
            "::test_a_sum_of_more_inputs_than_float32_adds_exactly_is_exact",
        ),
    ),
    Fault(
        id="magnitude-prunes-the-largest",
        file="compressors/prune/dense/magnitude.py",
        old="    smallest = flat.sort(stable=True).indices[: round(share * len(flat))]\n",
        new="    smallest = flat.sort(stable=True, descending=True).indices"
        "[: round(share * len(flat))]\n",
        effect="The largest weights become zero.",
        tests=(
            "tests/compressors/prune/test_magnitude.py"
            "::test_zero_smallest_zeroes_the_smallest_weights_and_changes_no_others",
        ),
    ),
    Fault(
        id="sparse-keeps-three-of-four",
        file="compressors/prune/dense/sparse_2_4.py",
        old="scatter_(1, permutation[:, :2], True)",
        new="scatter_(1, permutation[:, :3], True)",
        effect="Three of four weights remain, which no sparse kernel accepts.",
        tests=(f"{SPARSE}::test_kept_2_4_keeps_the_two_most_important_of_every_four_inputs",),
    ),
    Fault(
        id="sparse-reconstruction-ignores-removed-weights",
        file="compressors/prune/dense/sparse_2_4.py",
        old="    change = torch.where(is_kept, 0.0, -exact)",
        new="    change = torch.zeros_like(exact)",
        effect="The remaining weights are not refitted after pruning.",
        tests=(f"{SPARSE}::test_refit_kept_weights_equals_the_damped_least_squares_solution",),
    ),
    Fault(
        id="channels-drop-ties",
        file="compressors/prune/dense/importance.py",
        old="        total = torch.stack([importance[producer] for producer in tied]).sum(dim=0)\n",
        new="        total = importance[tied[0]]\n",
        effect="Layers that share channels are pruned by the importance of only one of them.",
        tests=(
            "tests/compressors/prune/test_channels.py::test_layers_whose_outputs_are_added_keep_the_same_channels",
        ),
    ),
    Fault(
        id="prune-rows-shared-row-unweighted",
        file="compressors/prune/tables/prune_rows.py",
        old="        lookups = count[block][chosen[block]].double() + UNSEEN\n",
        new="        lookups = torch.ones(int(chosen[block].sum()), dtype=torch.float64)\n",
        effect="The row of pruned ids is a plain mean instead of one weighted by lookups.",
        tests=(f"{PRUNE}::test_pruned_rows_share_their_mean_weighted_by_lookups",),
    ),
    Fault(
        id="prune-rows-min-lookups-off-by-one",
        file="compressors/prune/tables/prune_rows.py",
        old="kept_count = max(1, int((counts[unit.name] >= self.min_lookups).sum()))",
        new="kept_count = max(1, int((counts[unit.name] > self.min_lookups).sum()))",
        effect="Rows that training looks up exactly 'min_lookups' times are pruned.",
        tests=(f"{PRUNE}::test_min_lookups_keeps_rows_with_at_least_as_many_lookups_in_training",),
    ),
    Fault(
        id="lookups-count-padding",
        file="compressors/quantize/calibration/lookup_counts.py",
        old="        counted_ids = ids if padding is None else ids[ids != padding]\n",
        new="        counted_ids = ids\n",
        effect="Padding of bags counts as lookups of row 0.",
        tests=("tests/compressors/quantize/test_lookup_counts.py",),
    ),
    Fault(
        id="fold-forgets-the-mean",
        file="compressors/rewrite/fold.py",
        old="    shift = -norm.running_mean.double() * scale\n",
        new="    shift = torch.zeros_like(scale)\n",
        effect="A folded batch norm loses its mean.",
        tests=(
            "tests/compressors/rewrite/test_fold.py::test_batch_norm_factors_compute_the_norm_in_evaluation_mode",
        ),
    ),
    Fault(
        id="recalibration-by-raw-labels",
        file="compressors/distill/recalibrate.py",
        old="    label = np.where(label > 0.5, (clicks + 1) / (clicks + 2), "
        "1 / (len(label) - clicks + 2))\n",
        new="",
        effect="Perfectly separable rows give an infinite slope.",
        tests=(f"{RECALIBRATE}::test_fit_line_of_separable_labels_has_a_finite_slope",),
    ),
    Fault(
        id="recalibration-steep-beyond-data",
        file="compressors/distill/recalibrate.py",
        old="    first_slope, last_slope = min(slopes[0], 1.0), min(slopes[-1], 1.0)\n",
        new="    first_slope, last_slope = slopes[0], slopes[-1]\n",
        effect="Beyond the outer means the isotonic map extrapolates steeply.",
        tests=(f"{RECALIBRATE}::test_isotonic_map_beyond_its_outer_knots_has_slope_at_most_one",),
    ),
    Fault(
        id="probability-declared-as-logit-accepted",
        file="compressors/task_kinds/ctr.py",
        old="if clearly_above(loss - other_loss):\n",
        new="if clearly_above(other_loss - loss - 100):\n",
        effect="Probabilities declared as logits are packed.",
        tests=(f"{BASELINE}::test_probabilities_declared_as_logits_are_refused",),
    ),
    Fault(
        id="labels-of-one-class-accepted",
        file="compressors/metrics/baseline_checks.py",
        old="    if label.min() == label.max():\n",
        new="    if label.size == 0:\n",
        effect="Test rows of one class are packed, so no metric can compare models.",
        tests=(
            f"{BASELINE}::test_labels_of_one_class_are_refused_in_test_and_validation_and_a_warning_in_train",
        ),
    ),
    Fault(
        id="data-id-of-table-end-accepted",
        file="infra/data/split_statistics.py",
        old="if id_ is not None and not first <= id_ <= last}",
        new="if id_ is not None and not first <= id_ <= last + 1}",
        effect="An id equal to the number of table rows passes the check.",
        tests=(f"{DATA}::test_check_ids_refuses_ids_outside_their_table_unless_a_policy_applies",),
    ),
    Fault(
        id="data-too-long-lists-accepted",
        file="infra/data/split_statistics.py",
        old="    if isinstance(item, ListInput) and longest > item.shape[0]:\n",
        new="    if isinstance(item, ListInput) and longest > 2 * item.shape[0]:\n",
        effect="Lists longer than the input are accepted at pack.",
        tests=(f"{DATA}::test_check_ids_refuses_too_long_lists_of_clamped_ids",),
    ),
    Fault(
        id="validation-success-without-evaluation",
        file="infra/data/expectations.py",
        old="        success=all_passed and evaluated == intended and intended > 0,\n",
        new="        success=all(finding.success for finding in findings if finding.evaluated),\n",
        effect="Checks that were not evaluated count as passed.",
        tests=(
            "tests/infra/test_expectations.py"
            "::test_expectation_that_raises_is_not_evaluated_and_the_data_is_refused",
            "tests/infra/test_expectations.py"
            "::test_empty_file_fails_and_checks_that_need_rows_are_not_evaluated",
        ),
    ),
    Fault(
        id="splits-out-of-time-order-accepted",
        file="infra/data/checks.py",
        old='            {"max_value": 0},\n            later_split=later,\n',
        new='            {"max_value": 1e18},\n            later_split=later,\n',
        effect="Training rows later than the test rows pass the data checks.",
        tests=(
            "tests/infra/test_expectations.py::test_rows_after_the_start_of_a_later_split_fail",
        ),
    ),
    Fault(
        id="training-keeps-the-last-epoch",
        file="compressors/distill/training/trainer.py",
        old="            for name, tensor in self.state().items() if not self.keep_last_epoch else ():\n",
        new="            for name, tensor in self.state().items() if self.keep_last_epoch else ():\n",
        effect="Training ends with the last epoch instead of the best one.",
        tests=(
            "tests/compressors/distill/test_trainer.py"
            "::test_training_without_improvement_stops_after_patience_and_returns_the_start",
        ),
    ),
    Fault(
        id="step-not-compared-after-loading",
        file="compressors/core/runner.py",
        old="    if not torch.equal(loaded_scores, expected):\n",
        new="    if loaded_scores.shape != expected.shape:\n",
        effect="A step whose state is not stored passes: the loaded model scores differently.",
        tests=(
            "tests/compressors/core/test_broken_steps.py"
            "::test_a_step_that_breaks_its_contract_raises_contract_broken",
        ),
    ),
    Fault(
        id="named-unit-skipped-silently",
        file="compressors/core/skipping.py",
        old="        if name in units and any(is_named(units[name], pattern) for pattern in exact):\n",
        new="        if name in units and not exact:\n",
        effect="A unit that a recipe names exactly is skipped without an error.",
        tests=(
            "tests/compressors/core/test_skipping.py::test_a_step_that_names_an_unusual_unit_raises_step_refused",
        ),
    ),
)
