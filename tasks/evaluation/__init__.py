"""Compare models on the same rows. No Prefect.

parity.py   compares a module with its graph
quality.py  compares several models on the test rows
budget.py   measures the loss of quality on validation rows
"""
