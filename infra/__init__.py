"""Adapters: one folder for each outside system. No Prefect, no numerics.

errors/            what can go wrong here, and whether a retry helps
settings.py        the environment
telemetry.py       usage reports of libraries, switched off
credentials.py     passwords, tokens and keys removed from messages and logs
printable.py       text from outside that cannot control a terminal, a log or a page
log_records.py     a change to every log record of the process
memory.py          available memory
memory_reserve.py  memory held back to report that there is none left
child.py           processes that can be killed
store/             the object store
bundle/            trained models as model.json and safetensors
data/              parquet files, checked and as tensors
pages/             HTML and pictures
registry/          MLflow's model registry, and the ledger
onnxruntime/       ONNX Runtime
tensorrt/          TensorRT and TensorRT-RTX
triton/            Triton model repositories
services/          docker-compose.yml, and its services as processes
"""

from infra.telemetry import disable_telemetry

disable_telemetry()
