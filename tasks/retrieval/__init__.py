"""Encode and rank the catalogue of a retrieval model.

towers.py        computes vectors of queries and items, in torch or in a target's runtime
encode_items.py  computes the vectors of all items with a stored graph
rank.py          ranks the catalogue with the torch module
"""
