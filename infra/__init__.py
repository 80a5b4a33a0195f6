"""Adapters: one file hides one outside thing. Knows no Prefect and nothing of the maths.

settings.py       the environment
errors.py         what can go wrong here, split by whether a retry helps
store.py          the object store: a folder or S3, content-addressed, verified on read
ledger.py         who is champion: appended with conditional creates
registry.py       MLflow's model registry, a projection of what the store holds
bundle.py         the bundle format: model.json + safetensors
architecture.py   importing a network's class, allow-listed modules only
data.py           parquet files as tensors
expectations.py   Great Expectations suites made from a bundle's schema
page.py           our own page for a validation result
onnxruntime.py    sessions: scores, latency, the optimized graph
tensorrt.py       engines of TensorRT 10 / 11 and TensorRT-RTX, built in a child process
child.py          processes that can be killed
"""
