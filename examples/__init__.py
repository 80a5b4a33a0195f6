"""Reference models and the data sets they are trained on.

Demo input: nothing here is imported by ``flows``, ``tasks``, ``compressors`` or ``infra``.

dcnv2.py       the network: a DCN-v2 click model built from plain keyword arguments
movielens.py   MovieLens 100K as parquet splits, the network trained on it, and the draft of a
               bundle: ``python -m examples.movielens FOLDER``
table_heavy.py a click model that is nearly all tables, on drawn data with many rare ids:
               ``python -m examples.table_heavy FOLDER``
"""
