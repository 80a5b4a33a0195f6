"""Embedding tables with fewer or shared rows and dimensions: one step in each file.

row_map.py       a table in which several ids read one row
kept_rows.py     the map of kept rows, one byte per row
merge_rows.py    equal and nearly equal rows become one
cluster_rows.py  rarely looked-up rows share a few
prune_rows.py    the least important rows are removed
tiers.py         often looked-up rows and the others as two tables
dimensions.py    the least important dimensions are removed
drop_tables.py   whole tables become one row
"""
