"""Networks that exist only as an ONNX file, as torch networks.

rules.py       rewrite rules for what exporters write around a lookup
weights.py     follow trained weights through the simplification of a graph
normalize.py   bring a graph to one opset and simplify it
ids.py         find lookups whose ids may be negative
names.py       names of modules and values from those of initializers and nodes
layers.py      find the tables and dense layers of a graph
widths.py      find layers whose output only other layers read
conversion.py  convert a graph to the configuration and weights of a network
network.py     the network
operators/     the ONNX operators as functions of tensors
"""
