"""Read, validate and write bundles: folders with ``model.json`` and ``*.safetensors``.

A user writes a *draft*: the folder of a bundle without hashes. Packing it writes a sealed bundle,
whose ``model.json`` lists all files with their hashes.

json_limits.py      size limits of JSON text, checked before parsing
json_reader.py      strict reader for untrusted JSON
paths.py            validated path types for ``model.json``
shards.py           reads safetensors headers and checks weights, without loading tensors
architecture.py     imports a network's class, from allow-listed modules only
recorded_reads.py   records what a constructor reads from an argument
live_model.py       imports a trained network and describes its class and arguments
onnx_file.py        reads a user's ONNX file and its external data
sentence_transformer.py  reads the folder of a model of sentence-transformers
schema_versions.py  migrates earlier versions of ``model.json``
model_json.py       the fields of ``model.json``
bundle_folder.py    reads, validates and writes bundle folders
"""
