"""Pruning of dense layers by channels, layers or weights: one step in each file.

importance.py   how important a channel is
kept_shares.py  how many channels each width keeps
reconstruct.py  least-squares refit of layers whose inputs were removed
channels.py     output channels are removed
drop_layers.py  whole layers are removed
magnitude.py    the smallest weights become zero
sparse_2_4.py   two of every four weights become zero
l1_training.py  training with an L1 penalty
"""
