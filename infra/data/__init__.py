"""Inspect and check the parquet files of a model's data, and convert them to tensors.

parquet_inspection.py  the child process that reads an untrusted parquet file completely
parquet_inspector.py   starts that child process and sends it requests
parquet.py             reads parquet files as record batches, and checks their columns
column_arrays.py       converts parquet columns to arrays, and collects invalid values
tokenization.py        converts columns of texts to token ids
data_sample.py         samples rows and summarizes columns before a signature exists
splits.py              converts the splits of a model to tensors
split_statistics.py    ranges of ids and lengths of lists in a split, and checks of them
catalogue.py           converts the splits of a retrieval model to tensors
checks.py              plans the checks that a signature requires
findings.py            the results of checks, and the error for failed checks
expectations.py        runs the planned checks with Great Expectations
validation_page.py     renders the results of checks as an HTML page
"""
