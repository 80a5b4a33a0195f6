"""Write Triton model repositories.

pbtxt.py       writes protocol buffers as text
repository.py  writes the configuration and files of a served model
"""
