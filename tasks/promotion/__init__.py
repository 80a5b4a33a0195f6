"""Decide which version serves. No Prefect.

acceptance.py         checks whether a report allows promotion
champion.py           finds the version and report of a ledger entry
registry_listing.py   lists the versions of the registry
promotions.py         promotes, rolls back and fetches versions
triton_repository.py  keeps a Triton repository in step with the champion
"""
