"""Estimators of quality metrics: one class for each metric, which the metric's declaration names.

protocols.py  the methods of estimators of rows and of queries
auc.py        AUC of all rows, and within groups
log_loss.py   log loss and normalized entropy of all rows
ndcg.py       NDCG of lists of rows, and of the catalogue for each query
recall.py     recall of the catalogue for each query
builtin.py    imports all of them, for the digests of the tasks that measure
"""
