"""Steps that train or calibrate a model: on labels, or with the original model as teacher.

training/             the training loop, checkpoints and data parallel training
losses.py             losses between student and teacher scores
soft_labels.py        the loss on the teacher's predictions, mixed with the labels
auxiliary_losses.py   hint projections and an auxiliary head
student.py            build a smaller network of the same class
distill.py            step: train a pruned or smaller network with a teacher
fine_tune.py          step: train on the labels
code_reassignment.py  select new codes for packed (compressed) tables so that the loss decreases
refit_codes.py        step: train the codebooks or scales of packed tables, and select new codes
recalibrate.py        step: calibrate probabilities
"""
