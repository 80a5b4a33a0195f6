"""One side effect each, wrapped for Prefect: load, call, store. Tasks hand each other artifacts.

policy.py      what may be retried, how a task's result is found again; Prefect stores none
outages.py     services that are away: what is waited for, how long
pull.py        verify a bundle completely
validate.py    Great Expectations on every split
prepare.py     parquet to tensors
compress.py    one step of a recipe
tables.py      the tables of a stored file, of any size
lower.py       one ONNX graph for one target, parity-checked and audited
build.py       one TensorRT engine
measure.py     quality, latency and bytes of what is served
gate.py        limits against what was measured
publish.py     the release and its registry version
announce.py    progress and artifacts on Prefect's pages
log_lines.py   log lines that names from a bundle cannot forge

Without Prefect, for the command line as well:

stored.py      the store, local copies, the digest of our code
subject.py     the bundle an order is about
bundles.py     pack, check, show and find bundles
baseline.py    the uncompressed model's labels and scores, checked before it is compressed
table_files.py tables compressed from file to file, of any size
together.py    a step in this process, or in one for each of several devices
loading.py     a stored bundle as a module, a stored split as tensors
parity.py      module and graph compared on the same rows, and what to report if they differ
documents.py   what is stored as JSON beside the files
result_records.py  the record by which a task's result is found again, validated by its type
order_records.py   the record by which a finished order is found again
report.py      the report as a table and as Markdown
report_page.py the report as one HTML page; report_measured.py is its middle
acceptance.py  whether a report allows its version to become champion
champion.py    the registry version and report of the ledger's champion
registry_listing.py what the registry holds of ours
promotion.py   promote, roll back, fetch
"""

from infra.telemetry import disable_telemetry

disable_telemetry()  # before any module here imports Prefect
