"""What a model is trained for.

loss.py  the training loss of each task
"""
