"""Reference models and their training scripts.

``flows``, ``tasks``, ``compressors`` and ``infra`` never import these modules.

public_data.py finds the folder of a public data set
draft.py       writes the draft of a bundle; the command line that scripts share
training.py    the training loop with early stopping that scripts share
perceptron.py  hidden layers that several models share
field_tables.py  embedding tables that several models share
dcnv2.py       DCN-v2, a click model built from plain keyword arguments
movielens_data.py  reads and splits MovieLens 100K, and writes its rows and vocabularies
movielens.py   trains DCN-v2 on MovieLens 100K and writes the draft of a bundle:
               ``python -m examples.movielens FOLDER``
mmoe.py        MMoE, a model with several outputs
movielens_tasks.py  trains MMoE with two outputs on MovieLens 100K and writes the draft of a bundle:
               ``python -m examples.movielens_tasks FOLDER``
din.py         DIN, a click model with attention over a user's history
sasrec.py      SASRec, a transformer that retrieves the next item of a history
movielens_histories.py  trains DIN or SASRec on MovieLens 100K and writes the draft of a bundle:
               ``python -m examples.movielens_histories FOLDER --model din|sasrec``
deepfm.py      DeepFM, a factorization machine and a perceptron over the same embeddings
xdeepfm.py     xDeepFM, a DeepFM whose products of fields go through convolutions (CIN)
dlrm.py        DLRM, dot products of embeddings and a perceptron
frappe.py      trains DeepFM, xDeepFM or DLRM on Frappe and writes the draft of a bundle:
               ``python -m examples.frappe FOLDER --model deepfm|xdeepfm|dlrm --data FOLDER``
mq2008.py      trains a ranking perceptron on MQ2008 and writes the draft of a bundle:
               ``python -m examples.mq2008 FOLDER --data FOLDER``
two_tower.py   a two-tower retrieval model over ids, and its training loop
gowalla.py     trains the two-tower model on Gowalla check-ins and writes the draft of a bundle:
               ``python -m examples.gowalla FOLDER --data FOLDER``
scifact.py     writes the documents, queries and judgements of SciFact for a text encoder:
               ``python -m examples.scifact FOLDER --data FOLDER``
search_texts.py  searches documents with a released text encoder, without torch and recpress
table_heavy.py a click model whose bytes are almost all in tables, on synthetic data with many rare
               ids: ``python -m examples.table_heavy FOLDER``
"""
