"""Lower a compressed module to an ONNX graph for one serving target.

findings.py            what lowering reports about a graph
serving_wrapper.py     the served graph: id policy and output
merged_codebooks.py    several codebook tables as one
merged_tables.py       one lookup for several tables of one format
float8_tensors.py      8-bit floats as a graph stores them
attention.py           scaled dot-product attention
graph_builders.py      subgraphs that several targets use
bfloat16_products.py   bfloat16 products in a form that runs on a CPU
passes/                graph passes that every target uses
targets/               translations of each format, by target
external_weights.py    weights of a large graph as links to the bundle's files
export.py              torch.onnx.export with a target's translations
parity.py              compare the scores of graph and module
first_difference.py    the first tensor that differs
audit.py               what an optimized graph must and must not contain
"""
