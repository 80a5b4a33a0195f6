"""Transformer encoders of texts, as torch networks.

layers.py    self-attention, and a layer of the encoder
network.py   the encoder, and a retrieval model that uses it for queries and documents
families.py  converts settings and weights of Hugging Face's models to those of the encoder
pooling.py   converts settings of the other modules of sentence-transformers
"""
