"""A recpress home that an earlier version wrote, and what it has to be read as for ever.

``networks.py`` holds the models of the stored home, ``drafts.py`` writes their drafts, ``steps.py``
lists what is stored of every method, ``orders.py`` the orders. ``create.py`` writes a fixture
with all of it, ``archive.py`` packs and unpacks a fixture, ``scores.py`` computes the scores that
are compared. The tests are in ``tests/test_stored_home*.py``.
"""
