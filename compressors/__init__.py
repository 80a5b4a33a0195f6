"""PyTorch, numpy and pydantic: no Prefect, no network, no registry.

contracts/  types that every layer uses: signature, plan, bench, limits, verdicts
errors/     what can go wrong while a model is compressed
core/       model, units, formats, the step protocol, the runner, the list of methods
task_kinds/ what a model is trained for: its loss
metrics/    metrics, intervals and the judgement of limits
quantize/   tables and dense layers in fewer bits
prune/      rows, dimensions, tables, channels and layers removed
factorize/  tables and layers as products, hashes and neural codes
rewrite/    the same function with weights that compress better
distill/    training with the original model as teacher, or on the labels
lower/      a compressed module as a graph for one target, and its audit
"""
