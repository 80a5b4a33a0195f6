"""Adapters to outside systems, one folder for each. No Prefect, no numerics.

The ledger is the list of a model's promotions and rollbacks in the store.

errors/            the error classes of this package, by whether a retry can help
settings.py        reads the settings from environment variables
telemetry.py       disables the usage reports of libraries
arrow_memory.py    selects the memory pool of Arrow
credentials.py     removes passwords, tokens and keys from messages and logs
printable.py       escapes untrusted text for a terminal, a log or a page
log_records.py     applies a function to every log record of the process
memory.py          estimates the available memory
memory_reserve.py  reserves memory, so that an out-of-memory error can be reported
child.py           runs work in a child process that can be killed
timing.py          measures the latency of model sessions, and describes the machine
store/             the object store
bundle/            reads, validates and writes bundles: model.json and safetensors
data/              checks parquet files, and converts them to tensors
pages/             HTML pages and SVG charts
registry/          MLflow's model registry, and the promotion ledger
onnxruntime/       ONNX Runtime
tensorrt/          TensorRT and TensorRT-RTX
triton/            Triton model repositories
services/          the services of docker-compose.yml, also as local processes
"""

from infra.arrow_memory import select_system_pool
from infra.telemetry import disable_telemetry

disable_telemetry()
select_system_pool()
