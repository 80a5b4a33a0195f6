"""Compare models on the same rows. No Prefect.

single_rows.py     takes one row of a batch, and formats it for messages
parity.py          compares a torch module with the graph exported from it
graph_sessions.py  opens the stored graphs of a model in a target's runtime
latency.py         times several models at one batch size
quality.py         compares the quality of several models on the test rows
budget.py          measures the loss of quality on validation rows
"""
