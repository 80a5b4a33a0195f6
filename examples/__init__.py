"""Reference models and their training scripts.

``flows``, ``tasks``, ``compressors`` and ``infra`` never import these modules.

dcnv2.py       DCN-v2, a click model built from plain keyword arguments
movielens_data.py  reads and splits MovieLens 100K, and writes its rows and vocabularies
movielens.py   trains DCN-v2 on MovieLens 100K and writes the draft of a bundle:
               ``python -m examples.movielens FOLDER``
mmoe.py        MMoE, a model with several outputs
movielens_tasks.py  trains MMoE with two outputs on MovieLens 100K and writes the draft of a bundle:
               ``python -m examples.movielens_tasks FOLDER``
two_tower.py   a two-tower retrieval model over ids, and its training loop
gowalla.py     trains the two-tower model on Gowalla check-ins and writes the draft of a bundle:
               ``python -m examples.gowalla FOLDER --data FOLDER``
bert.py        a BERT encoder in plain torch, and a retrieval model that encodes queries and
               documents with it
minilm.py      writes all-MiniLM-L6-v2 and SciFact as the draft of a bundle:
               ``python -m examples.minilm FOLDER --data FOLDER --model FOLDER``
search_texts.py  searches documents with a released text encoder, without torch and recpress
table_heavy.py a click model whose bytes are almost all in tables, on synthetic data with many rare
               ids: ``python -m examples.table_heavy FOLDER``
"""
