"""Compare a lowered graph with its module.

parity.py             compare the scores of graph and module
rounding_errors.py    measure how far rounding errors change the scores of a network
first_difference.py   find the first tensor that differs
"""
