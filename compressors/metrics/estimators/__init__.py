"""Estimators of the metrics of quality: one object for each, which its declaration names.

protocols.py  what an estimator of rows and one of queries can compute
auc.py        AUC of all rows, and within groups
log_loss.py   log loss and normalized entropy of all rows
ndcg.py       NDCG of lists of rows, and of the catalogue for each query
recall.py     recall of the catalogue for each query
builtin.py    all of them, for the digests of the tasks that measure
"""
