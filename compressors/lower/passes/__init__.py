"""Passes over an exported graph that every target uses, one per file.

exact_rules.py     rewrite rules that do not change what a graph computes
simplify.py        inlining, constant folding and these rules
strip_metadata.py  removal of the exporter's metadata
"""
