"""Code that depends on a model's task.

loss.py  the training loss of each task, and batches in random order
"""
