"""Faults in metrics, intervals, rankings and score changes.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
A cluster is the rows of one group, such as a user; its impressions are these rows. Interleaved rounds
measure the latencies of two models in turn.
"""

from tests.seeded_faults.fault import Fault

METRICS = "tests/compressors/metrics/test_metrics.py"
INTERVALS = "tests/compressors/metrics/test_intervals.py"
CLUSTERS = "tests/compressors/metrics/test_cluster_intervals.py"
CHANGE = "tests/compressors/metrics/test_score_change.py"
RANKING = "tests/compressors/metrics/test_full_ranking.py"
TOP_K = "tests/compressors/metrics/test_top_k.py"

FAULTS = (
    Fault(
        id="auc-ties-count-as-losses",
        file="compressors/metrics/point_estimates.py",
        old='    not_above = np.searchsorted(negatives, positives, side="right")\n',
        new='    not_above = np.searchsorted(negatives, positives, side="left")\n',
        effect="A positive and a negative row with equal scores count 0 instead of 0.5.",
        tests=(f"{METRICS}::test_auc_equals_scikit_learn_with_ties",),
    ),
    Fault(
        id="gauc-ignores-impressions",
        file="compressors/metrics/point_estimates.py",
        old="return float(value @ impressions / impressions.sum())",
        new="return float(value.mean())",
        effect="GAUC weights all users equally instead of by their impressions.",
        tests=(f"{METRICS}::test_gauc_is_the_impression_weighted_mean_of_scikit_learns_auc",),
    ),
    Fault(
        id="gauc-ties-take-the-last-rank",
        file="compressors/metrics/point_estimates.py",
        old="rank = (run_end - (run_size - 1) / 2)[run]",
        new="rank = run_end[run]",
        effect="Equal scores within a group get the last of their ranks instead of the mean.",
        tests=(f"{METRICS}::test_gauc_is_the_impression_weighted_mean_of_scikit_learns_auc",),
    ),
    Fault(
        id="ndcg-linear-gains",
        file="compressors/metrics/point_estimates.py",
        old="gain = np.exp2(relevance) - 1",
        new="gain = relevance",
        effect="NDCG has linear gains instead of 2**label - 1.",
        tests=(
            f"{METRICS}::test_ndcg_equals_scikit_learn_with_exponential_gains_and_averaged_ties",
        ),
    ),
    Fault(
        id="logloss-hardly-clipped",
        file="compressors/metrics/point_estimates.py",
        old="    chance = np.clip(chance, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)\n",
        new="    chance = np.clip(chance, 1e-300, 1 - 1e-16)\n",
        effect="One confident wrong prediction costs hundreds of nats instead of 16.",
        tests=(f"{METRICS}::test_logloss_of_a_wrong_probability_of_one_is_the_float32_clip",),
    ),
    Fault(
        id="normalized-entropy-of-constant-rate",
        file="compressors/metrics/point_estimates.py",
        old="return float(losses.mean()) / float(base_entropy(float(positive.mean())))",
        new="return float(losses.mean()) / float(base_entropy(0.5))",
        effect="Normalized entropy divides by the entropy of a fair coin.",
        tests=(f"{METRICS}::test_normalized_entropy_of_the_base_rate_is_one",),
    ),
    Fault(
        id="interval-difference-not-paired",
        file="compressors/metrics/intervals.py",
        old="        pair = before(counts), after(counts)\n",
        new="        pair = before(counts), after(rng.permutation(counts))\n",
        effect="Two models are resampled separately, which widens the interval of the difference.",
        tests=(f"{INTERVALS}::test_the_interval_of_equal_scores_without_groups_is_exactly_zero",),
    ),
    Fault(
        id="interval-of-85-percent",
        file="compressors/metrics/intervals.py",
        old="    low, high = np.quantile(values, [TAIL, 1 - TAIL])\n",
        new="    low, high = np.quantile(values, [3 * TAIL, 1 - 3 * TAIL])\n",
        effect="Bootstrap intervals cover 85 % instead of 95 %.",
        tests=(f"{INTERVALS}::test_the_interval_of_a_mean_loss_is_the_normal_95_percent_interval",),
    ),
    Fault(
        id="cluster-interval-ignores-group-size",
        file="compressors/metrics/cluster_intervals.py",
        old="variance = float((change**2) @ (1 - share))",
        new="variance = float((change**2).sum() / change.size)",
        effect="Intervals of grouped rows are too narrow by the square root of the number of groups.",
        tests=(f"{CLUSTERS}::test_groups_of_one_row_give_the_interval_of_independent_rows",),
    ),
    Fault(
        id="cluster-interval-of-rows",
        file="compressors/metrics/intervals.py",
        old="    if group is not None:\n"
        "        return _estimate_paired_groups(estimator.jackknife_groups(rows), np.size(label))\n",
        new="    if group is not None and metric_name not in "
        '("auc", "logloss", "normalized_entropy"):\n'
        "        return _estimate_paired_groups(estimator.jackknife_groups(rows), np.size(label))\n",
        effect="Rows of one user count as independent: the intervals of AUC and log loss shrink.",
        tests=(f"{CLUSTERS}::test_copies_of_rows_do_not_narrow_the_interval",),
    ),
    Fault(
        id="few-groups-give-an-interval",
        file="compressors/metrics/cluster_intervals.py",
        old="    if counted_groups < MIN_GROUPS:\n",
        new="    if counted_groups < 2:\n",
        effect="Two groups are enough for an interval, so a limit is decided on too little data.",
        tests=(f"{CLUSTERS}::test_fewer_than_ten_groups_are_undecided_with_a_reason",),
    ),
    Fault(
        id="latency-ratio-not-interleaved",
        file="compressors/metrics/intervals.py",
        old="    if before.size == after.size:\n        values = _compute_quantiles",
        new="    if before.size != after.size:\n        values = _compute_quantiles",
        effect="Interleaved rounds are resampled separately: a shared slowdown does not cancel.",
        tests=(
            f"{INTERVALS}::test_latency_ratio_of_equally_many_rounds_resamples_the_same_rounds",
        ),
    ),
    Fault(
        id="ranking-shows-seen-items",
        file="compressors/metrics/full_ranking.py",
        old="        flat[torch.from_numpy(hidden)] = -torch.inf\n",
        new="",
        effect="Items that a query already has occupy positions of its ranking.",
        tests=(f"{RANKING}::test_full_ranking_equals_a_naive_ranking_for_every_block_size",),
    ),
    Fault(
        id="ranking-ties-count-as-found",
        file="compressors/metrics/estimators/recall.py",
        old="hits = np.maximum(last_rank - ranks.above, 0) / ranks.equal",
        new="hits = (ranks.above < ranks.depth).astype(float)",
        effect="A model with equal scores for all items has recall 1.",
        tests=(f"{RANKING}::test_recall_of_equal_scores_equals_the_recall_of_a_random_ranking",),
    ),
    Fault(
        id="map-divided-by-at-most-k",
        file="compressors/metrics/top_k.py",
        old="np.minimum(total / blocks.relevant_of_list, 1.0)",
        new="np.minimum(total / np.minimum(blocks.relevant_of_list, k), 1.0)",
        effect="MAP of lists with more than k relevant items is larger than that of trec_eval.",
        tests=(f"{TOP_K}::test_metrics_of_rows_without_ties_equal_trec_eval",),
    ),
    Fault(
        id="mrr-of-ties-is-that-of-the-best-order",
        file="compressors/metrics/top_k.py",
        old="none_yet[at] * (relevant / left) / (first.above[at] + position + 1)",
        new="(position == 0) / (first.above[at] + 1)",
        effect="A model with equal scores for all rows has an MRR of 1.",
        tests=(f"{TOP_K}::test_with_ties_each_metric_is_the_mean_over_all_orders_of_tied_rows",),
    ),
    Fault(
        id="average-precision-of-ties-ignores-other-items-of-the-block",
        file="compressors/metrics/top_k.py",
        old="others = (blocks.relevant - 1) / np.maximum(blocks.size - 1, 1)",
        new="others = np.zeros(blocks.size.size)",
        effect="MAP counts at each rank only the relevant items before the tied ones.",
        tests=(f"{TOP_K}::test_with_ties_each_metric_is_the_mean_over_all_orders_of_tied_rows",),
    ),
    Fault(
        id="score-change-counts-sign",
        file="compressors/metrics/score_change.py",
        old="change = np.abs(after - before) / (spread or 1.0)",
        new="change = (after - before) / (spread or 1.0)",
        effect="Decreasing scores cancel increasing ones in the mean score change.",
        tests=(f"{CHANGE}::test_score_changes_equal_a_computation_in_numpy",),
    ),
    Fault(
        id="changed-top1-counts-ties",
        file="compressors/metrics/score_change.py",
        old="shared = groups.sum_by_group(best[0] & best[1]) / groups.sum_by_group(best[1])",
        new="shared = (groups.sum_by_group(best[0] & best[1]) > 0).astype(float)",
        effect="A candidate with one score for all rows counts as changing no top-1 row.",
        tests=(
            f"{CHANGE}::test_changed_top1_is_the_share_of_groups_with_another_best_row",
            f"{CHANGE}::test_a_candidate_with_one_score_for_all_rows_has_correlation_zero",
        ),
    ),
    Fault(
        id="no-changed-top1-is-certain",
        file="compressors/metrics/score_change.py",
        old="    low, high = max(0.0, center - half_width), min(1.0, center + half_width)\n",
        new="    low, high = share, share\n",
        effect="Zero changed top-1 rows in few groups count as proof that none changes.",
        tests=(f"{CHANGE}::test_changed_top1_of_zero_among_50_groups_has_a_positive_upper_bound",),
    ),
)
