"""What can go wrong while a model is compressed: classes with codes and fields.

compression.py  the base class, and errors of several packages
"""
