"""How a compressed module is written down for one serving target, and the audit of it.

served.py       the graph around the model: the policy for ids out of range, the score
onnxruntime.py  one translation a format, for ONNX Runtime; onnxruntime_tables.py has the tables',
                onnxruntime_dense.py layers of few bits
tensorrt.py     the same for TensorRT and TensorRT-RTX; tensorrt_tables.py, tensorrt_types.py
dense_types.py  stored tensors of dense layers as operators take them
attention.py    scaled_dot_product_attention, also where all places are masked
onnx_pieces.py  pieces of graphs that both are made of
export.py       torch.onnx.export with a target's translations
graph_passes.py simplification of an exported graph by exact rules only
found.py        what lowering says about a graph
parity.py       does a graph compute what the module computes
first_difference.py  which tensor of a graph is the first that is not the module's
audit.py        what an optimized graph must and must not contain
"""
