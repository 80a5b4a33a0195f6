"""The model registry, and the ledger that decides the champion.

ledger.py           append-only entries in the object store
limits.py           lengths and characters of names, tags and URIs that MLflow can store
sqlite_file.py      the embedded registry's file, created and migrated atomically
mlflow_registry.py  versions and aliases in MLflow's model registry
"""
