"""Lower a compressed module to an ONNX graph for one serving target.

findings.py            result types of export, audit and parity check
value_policy.py        the policy for integers out of range, as operators of the graph
recurrent_layers.py    let recurrent layers call custom ops
serving_wrapper.py     the exported module: policy for ids out of range, and output
graph_weights.py       the stored tensors that a graph reads, and layers that affect no output
lookups/               lookups of several tables merged into one
float8_tensors.py      convert stored 8-bit floats to a graph's type
attention.py           translate scaled dot-product attention
recurrent.py           translate the custom ops of recurrent layers
custom_operators.py    register the custom PyTorch ops of all formats
graph_builders.py      build subgraphs that several targets use
passes/                changes and inspections of a graph that every target uses
targets/               translations of each format, by target
external_weights.py    hard links to the bundle's files for weights of a large graph
program.py             trace a graph, merge lookups, translate it with torch.onnx.export
export.py              write a graph in a target's types, and check its weights
comparison/            compare a graph with its module
audit.py               check an optimized graph against the plan
"""
