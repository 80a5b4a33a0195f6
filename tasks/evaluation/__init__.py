"""Comparisons of models on the same rows. No Prefect.

parity.py   module against graph
quality.py  several models on the test rows
budget.py   the loss of quality on validation rows
"""
