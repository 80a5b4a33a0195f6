"""Errors that are raised while a model is compressed: classes with codes, fields and sentences.

parity_failure.py  details of a failed comparison of a graph's scores with its module's
compression.py     the base class, and errors that several packages raise
construction.py    errors of building a network from its class
widths.py          exceptions with the reason why layers or channels cannot be removed
steps.py           errors of applying a step to a network
inspection.py      errors of deriving the inputs and outputs of a trained network
onnx_graphs.py     errors of converting an ONNX graph to a network
text_encoders.py   errors of reading a trained text encoder
metrics.py         errors of computing metrics and judging limits
orders.py          errors about parts of an order that do not fit together
"""
