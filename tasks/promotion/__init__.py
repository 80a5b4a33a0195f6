"""Decide which version of a model serves: promote, roll back, fetch. No Prefect.

The ledger is the list of a model's promotions and rollbacks in the store.

acceptance.py         checks whether a report allows promotion
champion.py           finds the version and report of a ledger entry
registry_listing.py   lists the versions in the registry
promotions.py         promotes, rolls back and fetches versions
triton_repository.py  copies the champion to a Triton model repository
"""
