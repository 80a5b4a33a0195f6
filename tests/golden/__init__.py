"""Golden lock: a committed record of what every compression method and lowering produces.

A move or a renaming of code must not change a number. The lock compresses reference networks with
every registered method, lowers them for every target, and compares stored tensors, scores, graph
initializers, operators and connections with ``record.json``.

Read in this order:

package.py   what the lock uses of recpress, and how today's names map to the record's names
cases.py     reference networks, recipes and settings
entries.py   one case as entries: key, value
numerics.py  tensors as one line of text: shape, digest and statistics; what a CPU can change
compare.py   differences between entries and the record
__main__.py  rewrites the record

A commit that changes the record lists each change and its reason in its message.
"""
