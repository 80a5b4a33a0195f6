"""Build engines with TensorRT and TensorRT-RTX.

build.py    the child process that builds an engine; the only file that calls TensorRT
audit.py    the audit that an engine must pass
engines.py  builds and audits engines in that process
"""
