"""Backward compatibility: recpress homes of earlier versions, and the results to expect from them.

A home is a folder with all files of one recpress installation. A fixture is a stored home with its
expected results, in a folder below ``fixtures``.

``networks.py`` defines the models of a stored home and ``drafts.py`` writes their drafts.
``steps.py`` lists the recipes and ``orders.py`` the orders. ``settings.py`` lists all settings that
an order may contain. ``create.py`` writes a fixture with these models, recipes, orders and
settings, and ``archive.py`` packs and unpacks a fixture. ``scores.py`` computes the compared
scores, and ``stored.py`` opens fixtures for the tests. The tests are in
``tests/test_stored_home*.py``.
"""
