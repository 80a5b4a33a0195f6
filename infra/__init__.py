"""Adapters: one file hides one outside thing. Knows no Prefect and nothing of the maths.

settings.py        the environment
telemetry.py       usage reports of libraries, switched off
credentials.py     passwords, tokens and keys kept out of messages, logs and addresses
errors.py          what can go wrong here, split by whether a retry helps
printable.py       text from outside that cannot control a terminal, a log or a page
disk.py            what an error of the local disk means
memory.py          how much memory is available, what an out-of-memory error is
memory_reserve.py  memory held back, so that its lack can be reported
log_records.py     a change that every log record of the process passes through
temporary.py       temporary files that name their owner; those of killed runs are collected
store.py           the object store: a folder or S3, content-addressed, verified on read
store_manifest.py  what a stored artifact's manifest says
store_chunks.py    files as hashed chunks
store_records.py   small records with a seal over their bytes
store_folder.py    the store in a folder
store_s3.py        the store in an S3 bucket
ledger.py          who is champion: appended with conditional creates
registry.py        MLflow's model registry, a projection of what the store holds
registry_limits.py what it can store: lengths and characters of names, tags and sources
registry_file.py   its SQLite file: created and migrated as a whole, or not at all
lock.py            a lock between processes of one machine
bundle.py          the bundle format: model.json + safetensors
json_limits.py     limits of JSON text, checked before it is parsed
bundle_json.py     model.json read strictly, its faults in sentences
bundle_paths.py    which paths in model.json may be followed
bundle_shards.py   safetensors files looked at without loading them
architecture.py    importing a network's class, allow-listed modules only
data.py            parquet files as tensors
parquet.py         parquet as record batches, what each column must hold
parquet_inspector.py   foreign parquet files, read first by a process that may be killed
parquet_inspection.py  that process
checks.py          which checks a schema asks for
expectations.py    Great Expectations, running those checks
html.py            what our HTML pages have in common
page.py            our own page for a validation result
pictures.py        the report's pictures as SVG
onnxruntime.py     sessions: scores, latency, the optimized graph
tensorrt.py        engines of TensorRT 10 / 11 and TensorRT-RTX
tensorrt_build.py  the child process that builds one
tensorrt_audit.py  what an engine must prove
child.py           processes that can be killed
answers.py         what a service answers to one question, within seconds
services.py        docker-compose.yml read as plain processes
services_local.py  those processes, started in order, watched and stopped (make up-local)
postgres.py        a Postgres cluster as its image would make it
setup.py           what the services need once: buckets, work pools, deployments
"""

from infra.telemetry import disable_telemetry

disable_telemetry()
