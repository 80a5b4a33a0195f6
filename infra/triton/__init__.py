"""Write Triton model repositories.

pbtxt.py       writes protocol buffers in text format
repository.py  writes the configuration and files of a served model
"""
