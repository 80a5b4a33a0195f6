"""Passes over an exported graph that every target uses: one in each file.

exact_rules.py     rewrite rules that do not change what a graph computes
simplify.py        inlining, constant folding and these rules
strip_metadata.py  the exporter's metadata removed
"""
