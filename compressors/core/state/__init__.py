"""Save and load a module as tensors and records, without a second copy of a table in memory.

safetensors_stream.py  write a safetensors file in pieces, in any order
safetensors_rows.py    read rows of a stored tensor into one buffer
tensor_files.py        write the files of a module's tensors; link unchanged ones
plain_values.py        find tensors, devices and texts outside a module's state dict
meta_device.py         build a network without the values of its weights
recorded_object.py     an argument of which only the constructor's reads are known
argument_values.py     create the objects that a network's configuration describes
construction.py        build a network from its class and assign stored tensors
module_state.py        build, save and load modules with compressed parts
"""
