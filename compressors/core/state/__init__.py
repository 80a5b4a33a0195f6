"""A module as tensors plus records, and back, without a second copy of a table.

safetensors_stream.py  a safetensors file, written in pieces and in any order
safetensors_rows.py    rows of a stored tensor, read into one buffer
plain_values.py        what a module holds besides parameters, buffers and submodules
meta_device.py         a network built without weights
construction.py        a network from its class, with stored tensors
module_state.py        the tensors and records of a module, and their inverse
"""
