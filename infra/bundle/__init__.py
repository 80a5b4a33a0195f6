"""Bundles: a folder with ``model.json`` and ``*.safetensors``.

json_limits.py    limits of JSON text, checked before it is parsed
json_reader.py    JSON from outside, read strictly
paths.py          which paths in ``model.json`` may be followed
shards.py         safetensors files, inspected without loading them
architecture.py   a network's class, imported from allow-listed modules only
bundle_folder.py  the bundle format
"""
