"""The training loop that all steps with training share.

settings.py        epochs, learning rate, schedule and other settings
trainable.py       the tensors that training may change
checkpoint.py      stored progress of a long step
data_parallel.py   training in several processes
item_sampler.py    draws items of a catalogue as negatives
trainer.py         the training loop
training_steps.py  selection of units and results that these steps share
"""
