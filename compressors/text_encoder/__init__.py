"""Transformer encoders of texts, as torch networks.

layers.py    self-attention, and a layer of the encoder
network.py   the encoder, and a retrieval model that uses it for queries and documents
families.py  the encoder's arguments and weights from those of Hugging Face's models
pooling.py   the encoder's arguments from the other modules of sentence-transformers
"""
