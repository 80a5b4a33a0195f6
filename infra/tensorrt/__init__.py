"""Engines of TensorRT and TensorRT-RTX.

build.py    the child process that builds an engine; the only file that calls TensorRT
audit.py    what an engine must prove
engines.py  engines, built and audited
"""
