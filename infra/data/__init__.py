"""Parquet files: inspected, checked, and read as tensors.

parquet_inspection.py  reads a parquet file completely, in a process that may be killed
parquet_inspector.py   the parent's side: starts and queries that process
parquet.py             parquet files as record batches
splits.py              the splits of a model as tensors
catalogue.py           the splits of a retrieval model
checks.py              which checks a signature requires
expectations.py        those checks, run by Great Expectations
validation_page.py     an HTML page of their results
"""
