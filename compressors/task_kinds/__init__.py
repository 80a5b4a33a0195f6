"""Task kinds: losses and score checks of each kind of model output.

A task kind (``ctr``, ``ranking``, ``retrieval``) is declared in
``compressors/contracts/task_kind.py``. The declaration names the class in this folder that has the
kind's functions.

protocol.py         the functions that a task kind has
outputs.py          convert outputs to logits, and scores of a list to a softmax over the list
loss.py             the training loss of a signature, and batches in random order
ctr.py              click prediction
ranking.py          scores that order the rows of each list
sampled_softmax.py  cross entropy over a sample of items
retrieval.py        two towers whose vectors score all items
builtin.py          imports all task kinds, so that cache keys depend on their sources
"""
