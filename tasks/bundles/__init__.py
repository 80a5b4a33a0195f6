"""Packed models: pack, find and load. No Prefect.

bundle_ref.py   the bundle that an order refers to
packing.py      pack, check, show and find bundles
loading.py      loads a stored bundle as a module, a stored split as tensors
baseline.py     checks a bundle's model and labels before compression
teachers.py     finds the teachers of an order
table_files.py  compresses tables from file to file
"""
