"""Metrics of models, their confidence intervals, and the decision on limits.

point_estimates.py    AUC, log loss, NDCG and others, as functions of arrays
full_ranking.py       recall and NDCG of a retrieval model over the whole catalogue
cluster_intervals.py  intervals of metrics of grouped rows: groups are the units
intervals.py          95 % intervals of paired differences
estimators/           the metrics of quality, one object for each
score_change.py       how much single scores differ from the baseline's
baseline_problem.py   a problem of the uncompressed model
baseline_checks.py    checks of the uncompressed model on its test rows
judge.py              compare estimates with limits: accepted, rejected or undecided
validation_score.py   quality on validation data, for the selection inside steps
"""
