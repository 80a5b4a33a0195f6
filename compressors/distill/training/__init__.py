"""The training loop that all steps share that train.

settings.py        how long, how fast, and what is trained
trainable.py       the tensors that training may change
checkpoint.py      the progress of a long step, stored
data_parallel.py   one training in several processes
trainer.py         the training loop
training_steps.py  what all steps share that train
"""
