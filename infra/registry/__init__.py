"""The model registry, and the ledger that decides the champion.

ledger.py           append-only entries in the object store
limits.py           limits on names, tags and URIs that a registry can store
sqlite_file.py      the embedded registry's file, created and migrated atomically
mlflow_registry.py  versions and aliases in MLflow's model registry
"""
