"""Pruning of dense layers: remove channels or layers, or set weights to zero.

importance.py   importance scores of weights and channels
kept_shares.py  how many channels each width keeps
reconstruct.py  least-squares refit of layers whose inputs were removed
channels.py     step: remove output channels
drop_layers.py  step: remove whole layers
magnitude.py    step: set the smallest weights to zero
sparse_2_4.py   step: set two of every four weights to zero
l1_training.py  step: train with an L1 penalty
"""
