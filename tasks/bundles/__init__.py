"""Packed models: pack, find and load. No Prefect.

bundle_ref.py   the bundle that an order refers to
packing.py      pack, check, show and find bundles
loading.py      a stored bundle as a module, a stored split as tensors
baseline.py     checks of a bundle's own model before it is compressed
teachers.py     the models that teach
table_files.py  tables compressed from file to file
"""
