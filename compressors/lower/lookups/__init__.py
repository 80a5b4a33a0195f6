"""Lookups of tables, rewritten in the program that torch traced, before it becomes an ONNX graph.

program_editor.py    change a traced program
layout.py            follow elements through operators that only rearrange them
find_lookups.py      find the lookups of tables, and the columns of their ids
merged_codebooks.py  merge several tables with codebooks into one
merged_tables.py     concatenate tables
merge_lookups.py     merge the lookups of several tables into one
join_rows.py         use merged rows directly where a network joins them again
code_operators.py    custom ops that pass codes of tables to int8 layers
merged_scales.py     tables with one scale each, as codes for int8 layers
codes_into_layers.py pass the codes of tables to int8 layers
"""
