"""Save and load a module as tensors plus records, without a second copy of a table in memory.

safetensors_stream.py  write a safetensors file in pieces, in any order
safetensors_rows.py    read rows of a stored tensor into one buffer
tensor_files.py        files of a module's tensors; unchanged ones are linked
plain_values.py        tensors, devices and texts outside a module's state
meta_device.py         build a network without weights
construction.py        build a network from its class and assign stored tensors
module_state.py        save, load and build modules from tensors and records
"""
