"""The science: pure torch and pydantic. Knows no Prefect, no network, no registry.

Read in this order:

contracts.py   the words that cross layers (types only; the one module ``infra`` may import)
measures.py    what is known of each metric; limits.py: limits on them, and what they can mean
step_protocols.py  the two step protocols
step.py        the one place that runs every step
skipping.py    steps without the units that do not allow them
better_format.py  a better format for tables that a method would not make smaller
steps.py       the list of methods; to add one, write its file and list it there
state.py       a module as tensors plus records, and back
construction.py  a network from its class, without weights; meta.py and plain_values.py help it
batches.py     prepared data as batches of model inputs
formats.py     packed tables and layers, and bags around them
composed.py    tables made of smaller tables; recompose.py makes them
table_stream.py  tables of any size, from block to block
tables/        methods for embedding tables, one file each
dense/         methods for dense layers, one file each
distill/       training on the task, with the original as teacher
lower/         how a compressed module is written down for one target, and the audit of it
metrics.py     AUC, log loss, NDCG
intervals.py   paired 95 % intervals; cluster_intervals.py where rows belong to groups
baseline_checks.py  whether the uncompressed model makes sense on its own test rows
judge.py       limits against estimates
"""
