"""Small models of sentence-transformers with random weights, and the vectors that it computes.

create.py  writes ``fixtures``; needs sentence-transformers and transformers, which tests do not
"""
