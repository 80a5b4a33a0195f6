"""Small sentence-transformers models with random weights, and the vectors of this library.

create.py  writes ``fixtures``; needs sentence-transformers and transformers, which tests do not
"""
