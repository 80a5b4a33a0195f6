"""What can go wrong while a model is compressed: classes with codes and fields.

parity_failure.py  how a graph and its module disagree
compression.py     the base class, and errors of several packages
construction.py    a network that cannot be built
widths.py          a width that cannot be reduced
steps.py           a step that cannot change this network
metrics.py         metrics and limits
orders.py          parts of an order that do not fit together
"""
