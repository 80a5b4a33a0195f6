"""Build engines with TensorRT and TensorRT-RTX.

engines.py  starts a child process that builds and audits an engine; the result types
build.py    the program of that child process; the only file that calls TensorRT
audit.py    checks an engine's weights and scratch memory against the plan
"""
