"""Estimators of quality metrics: one class for each metric, which the metric's declaration names.

protocols.py  the methods of estimators of rows and of queries
auc.py        AUC of all rows, and within groups
log_loss.py   log loss and normalized entropy of all rows
lists.py      base classes of estimators of the first ranks of lists
ndcg.py       NDCG of lists of rows, and of the catalogue for each query
top_k.py      MRR, MAP, hits and precision of both, and recall of lists
recall.py     recall of rankings of the catalogue
builtin.py    imports all of them, so that cache keys of tasks depend on their sources
"""
