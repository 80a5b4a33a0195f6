"""Methods for embedding tables: one storage format and one step a file.

A format's file reads from top to bottom: ``encode`` and ``decode`` as plain functions of
tensors, the custom op with its gradient, the format object, the step's settings.
"""
