"""Changes and inspections of an exported graph that every target uses.

exact_rules.py       rewrite rules that do not change what a graph computes
simplify.py          inline functions, fold constants and apply these rules
bfloat16_matmuls.py  rewrite bfloat16 matmuls to run on a CPU
strip_metadata.py    remove the exporter's metadata
table_reads.py       how a graph reads the stored tensors of a table
"""
