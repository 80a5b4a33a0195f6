"""Prefect tasks: each has one side effect, and tasks exchange artifacts.

orchestration/      retries, result records, progress; the workspace
bundles/            packed models: pack, find, load
pull.py             verify a bundle
validate.py         run Great Expectations on every split
prepare.py          converts parquet to tensors
score.py            the predictions of a model for a split
rank.py             the full ranking of a retrieval model
compress.py         one step of a recipe
tables.py           the tables of a stored file, of any size
target_adapters.py  the builder and the runtime of a target
lower.py            the graphs of one target, compared and audited
build.py            the engines of one target
evaluation/         comparisons of models on the same rows
stages.py           bytes and quality that each step contributes
measure.py          quality, latency and bytes of the served graphs
gate.py             judges measurements against limits
report/             renders results as tables and pages
publish.py          the release and its registry version
promotion/          decides which version serves
"""

from infra.telemetry import disable_telemetry

disable_telemetry()
