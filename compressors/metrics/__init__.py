"""Metrics, their intervals, and limits judged on them.

point_estimates.py    AUC, log loss, NDCG and others, as functions of arrays
full_ranking.py       recall and NDCG of a retrieval model over the whole catalogue
cluster_intervals.py  intervals that treat groups of rows as the units
intervals.py          95 % intervals of paired differences
score_change.py       how much single scores change
baseline_checks.py    checks of the uncompressed model on its test rows
judge.py              limits against estimates: accepted, rejected or undecided
validation_score.py   quality on validation rows, by which steps select
"""
