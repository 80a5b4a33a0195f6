"""Golden test: a committed record of the results of every compression method and lowering.

Moving or renaming code must not change a number in the record. The test compresses reference
networks with every registered method and lowers them for every target. It compares stored tensors,
scores, graph initializers, operators and connections with ``record.json``.

Reading order:

package.py   the recpress API that the test uses, and the mapping of current names to record names
cases.py     reference networks, recipes and settings
entries.py   converts one case to entries: key, value
numerics.py  describes a tensor in one line: shape, digest, statistics; tolerances for other CPUs
compare.py   compares entries with the record
__main__.py  rewrites the record

A commit that changes the record lists each change and its reason in its message.
"""
