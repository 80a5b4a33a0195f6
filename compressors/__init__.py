"""The science: pure torch and pydantic. Knows no Prefect, no network, no registry.

Read in this order:

contracts.py   the words that cross layers (types only; the one module ``infra`` may import)
step_protocols.py  the two step protocols
step.py        the one place that runs every step
skipping.py    steps without the units that do not allow them
better_format.py  a better format for tables that a method would not make smaller
steps.py       the list of methods; to add one, write its file and list it there
state.py       a module as tensors plus records, and back
batches.py     prepared data as batches of model inputs
formats.py     packed tables and layers, and bags around them
composed.py    tables made of smaller tables; recompose.py makes them
table_stream.py  tables of any size, from block to block
tables/        methods for embedding tables, one file each
dense/         methods for dense layers, one file each
distill/       training on the task, with the original as teacher
lower/         how a compressed module is written down for one target, and the audit of it
metrics.py     AUC, log loss, NDCG and their paired bootstrap intervals
judge.py       limits against estimates
"""
