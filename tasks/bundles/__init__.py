"""Draft, pack, find and load bundles. No Prefect.

A draft is a folder with a model and its data. Packing checks a draft and stores it as a bundle.

bundle_ref.py      finds a bundle in the store by name and version
draft_request.py   the user's description of a network, and the rows of the data
onnx_models.py     reads a trained network from an ONNX file and checks its outputs
text_models.py     reads a trained text encoder from a folder of sentence-transformers
draft_signature.py describes the signature of a network for a new draft
text_signature.py  describes the signature of a text encoder
new_draft.py       writes a draft from a trained network and its data
packing.py         packs, checks and shows bundles
loading.py         loads a stored bundle as a module, a stored split as tensors
baseline.py        checks a bundle's model and labels before compression
teachers.py        finds the teachers of an order
table_files.py     compresses the tables of files of any size
"""
