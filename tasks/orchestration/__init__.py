"""Code that all tasks share: retries, cached results, progress and the workspace.

workspace.py        the store and the local artifact copies of this process
documents.py        JSON that is stored next to artifacts
new_report.py       the report of an order, from the results of its tasks
code_digest.py      the digest of the sources that a task imports
result_records.py   records of task results, read on a repeated run
order_records.py    records of finished orders, read on a repeated order
outages.py          waits while a service does not respond
policy.py           which faults are retried, and how results are cached
log_lines.py        escapes log lines so that they cannot be forged
progress.py         progress and results on Prefect's pages
memory_estimate.py  estimates the peak memory of an order from sizes
data_parallel.py    runs a step in several processes, one per device
"""
