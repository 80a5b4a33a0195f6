"""The model registry, and the ledger that decides the champion.

ledger.py           append-only entries in the object store
limits.py           lengths and characters that a registry can store
sqlite_file.py      the embedded registry's file, created and migrated as a whole
mlflow_registry.py  MLflow's model registry
"""
