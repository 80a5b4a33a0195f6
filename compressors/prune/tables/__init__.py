"""Embedding tables with fewer or shared rows and dimensions: one step in each file.

row_map.py       format: several ids share one stored row
kept_rows.py     map of kept rows, one byte per row
merge_rows.py    step: merge equal and nearly equal rows
cluster_rows.py  step: rarely looked-up rows share a few rows
prune_rows.py    step: remove the least important rows
tiers.py         step: split rows by lookups into two tables
dimensions.py    step: remove the least important dimensions
drop_tables.py   step: replace whole tables by one row
"""
