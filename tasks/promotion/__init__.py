"""Which version serves. No Prefect.

acceptance.py         whether a report allows promotion
champion.py           from a ledger entry to version and report
registry_listing.py   the versions that the registry holds
promotions.py         promote, roll back, fetch
triton_repository.py  the Triton repository of the champion
"""
