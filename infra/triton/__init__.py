"""Triton model repositories.

pbtxt.py       protocol buffers as text
repository.py  the configuration and files of a served model
"""
