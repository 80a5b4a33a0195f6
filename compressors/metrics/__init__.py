"""Metrics of models, their confidence intervals, and the decision on limits.

point_estimates.py    AUC, log loss, NDCG and others, as functions of arrays
top_k.py              MRR, MAP, hits, recall and precision of the first k ranks
full_ranking.py       rankings of the whole catalogue by a retrieval model
cluster_intervals.py  95 % intervals of metrics whose rows belong to groups
intervals.py          95 % intervals of metrics, their differences, and latency
estimators/           one estimator class for each quality metric
score_change.py       how much a candidate's scores differ from the baseline's
baseline_problem.py   a problem of the uncompressed model, as a data class
baseline_checks.py    checks of the uncompressed model on its test rows
measured.py           the measured numbers of one target
score_reasons.py      describes how much scores changed, for verdicts
judge.py              decide whether limits hold: accepted, rejected or undecided
validation_ranking.py the metric of a ranking of the items in validation and training data
validation_score.py   the metric on validation data, for steps that select by it
"""
