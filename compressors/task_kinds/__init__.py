"""Kinds of tasks: the functions of each, which its declaration names.

protocol.py   what the functions of a kind are
outputs.py    outputs as logits, and as shares of lists
loss.py       the training loss of a signature, and batches in random order
ctr.py        click prediction
ranking.py    scores that order the rows of each list
builtin.py    all of them, for the digests of the tasks that use them
"""
