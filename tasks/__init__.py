"""Prefect tasks: each has one side effect, and tasks exchange artifacts.

orchestration/      retries, cached results, progress, JSON documents, the object store
bundles/            packs, finds and loads bundles
pull.py             verifies a stored bundle
validate.py         checks every split with Great Expectations
prepare.py          converts a parquet split to tensors
score.py            computes a model's predictions for a split
compress.py         applies one step of a recipe
tables.py           compresses the tables in the files of an artifact, of any size
target_adapters.py  returns the engine builder and the runtime of a target
retrieval/          encodes and ranks the catalogue of a retrieval model
lower.py            exports the graphs of one target, compares and audits them
build.py            builds the engines of one target
evaluation/         compares models on the same rows
stages.py           measures bytes and quality after each step
measure.py          measures quality, latency and bytes of the served graphs
gate.py             judges measurements against limits
report/             renders results as tables and pages
publish.py          publishes the release and its registry version
promotion/          decides which version serves
"""

from infra.telemetry import disable_telemetry

disable_telemetry()
