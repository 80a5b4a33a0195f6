"""Recovering quality by training: ``fine_tune`` on the labels, ``distill`` from the original.

Both train with ``compressors.training``; read that first. Losses are in ``compressors.loss``.
"""
