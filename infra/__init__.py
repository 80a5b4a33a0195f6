"""Adapters: one folder for each outside system. No Prefect, no numerics.

errors/            errors of this package, by whether a retry can help
settings.py        settings, read from environment variables
telemetry.py       usage reports of libraries, switched off
arrow_memory.py    the memory pool of Arrow
credentials.py     passwords, tokens and keys removed from messages and logs
printable.py       text from outside that cannot control a terminal, a log or a page
log_records.py     changes to every log record of the process
memory.py          available memory
memory_reserve.py  reserved memory, released so that an out-of-memory error can be reported
child.py           processes that can be killed
timing.py          interleaved timing of sessions, and the description of the machine
store/             the object store
bundle/            bundles: trained models as model.json and safetensors
data/              parquet files: validated, and converted to tensors
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
