"""Several tables looked up as one, so that a request of one row needs fewer operators.

merged_codebooks.py    merge several tables with codebooks into one
merged_tables.py       merge the lookups of several tables
"""
