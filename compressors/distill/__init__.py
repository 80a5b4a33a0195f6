"""Training: on the labels, or with the original model as teacher.

training/             the training loop, its checkpoints and its processes
losses.py             losses between student and teacher
soft_labels.py        the teacher's predictions as labels
auxiliary_losses.py   hint projections and an auxiliary head
student.py            a smaller network of the same class
distill.py            train a pruned or smaller network
fine_tune.py          train on the labels
code_reassignment.py  which codes would lower the loss
refit_codes.py        train tables of codes through the quantizer
recalibrate.py        calibrate probabilities
"""
