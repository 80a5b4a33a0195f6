"""A compressed module as a graph for one target.

findings.py            what lowering reports of a graph
serving_wrapper.py     the served graph: id policy and output
merged_codebooks.py    tables of codes with one merged codebook
merged_tables.py       tables of one format, looked up as one
dense_types.py         stored tensors of dense layers as operators take them
attention.py           scaled dot-product attention
graph_builders.py      parts of graphs that targets share
bfloat16_products.py   bfloat16 products in a form that runs on a CPU
passes/                passes over a graph that every target uses
targets/               one translation for each format and target
export.py              torch.onnx.export with a target's translations
parity.py              does the graph compute what the module computes
first_difference.py    the first tensor that differs
audit.py               what an optimized graph must and must not contain
"""
