"""Compress, evaluate and lower models in memory: no Prefect, no network access, no registry.

contracts/  types that every layer uses: signature, plan, bench, limits, verdicts
errors/     errors with codes and fields, raised while a model is compressed
core/       model, units, formats, the step protocol, the runner of steps, the list of all steps
inspection/ derive the inputs and outputs of a trained network from calls of it
onnx_network/ a torch network that computes an ONNX graph
text_encoder/ a transformer encoder of texts, as sentence-transformers has it
task_kinds/ losses of each kind of model output, and checks for scores worse than chance
metrics/    compute metrics and intervals, and judge limits
quantize/   store tables and dense layers in fewer bits
prune/      remove rows, dimensions, tables, channels and layers
factorize/  replace tables and layers by products of smaller ones, hashed rows or learned codes
rewrite/    change weights so that they compress better, with the same scores
distill/    train with the original model as teacher, or on the labels
lower/      export a compressed module as a graph for one target, and check its stored formats
"""
