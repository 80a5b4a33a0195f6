"""Convert an ONNX graph to a PyTorch network, and run that network.

lookup_rewrites.py rewrite rules that reduce an exported embedding lookup to one Gather
trained_weights.py find trained weights, and track them while the graph is simplified
normalize.py       convert a graph to opset 18 or later and simplify it
negative_ids.py    detect lookups whose ids may be negative
names.py           derive names of modules and values from initializers and nodes
module_calls.py    find the embedding tables and dense layers of a graph
shared_widths.py   find dense layers whose output is the input of dense layers only
conversion.py      convert a graph to the configuration and weights of the network
network.py         the network
operators/         ONNX operators as functions of tensors
"""
