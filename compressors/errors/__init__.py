"""Errors that are raised while a model is compressed: classes with codes and fields.

parity_failure.py  details of a failed parity check
compression.py     the base class, and errors of several packages
construction.py    errors of building a network from its class
widths.py          exceptions with the reason why a unit cannot be removed
steps.py           errors of applying a step to a network
metrics.py         errors of computing metrics and judging limits
orders.py          errors about parts of an order that do not fit together
"""
