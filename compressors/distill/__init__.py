"""Steps that train a model: on the labels, or with the original model as teacher.

training/             the training loop, checkpoints and data parallel training
losses.py             losses between student and teacher
soft_labels.py        the teacher's predictions as labels
auxiliary_losses.py   hint projections and an auxiliary head
student.py            a smaller network of the same class
distill.py            train a pruned or smaller network
fine_tune.py          train on the labels
code_reassignment.py  new codes of packed tables that lower the loss
refit_codes.py        train packed tables through the quantizer
recalibrate.py        calibrate probabilities
"""
