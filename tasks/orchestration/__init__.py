"""What all tasks share: retries, cached results, progress and the workspace.

workspace.py        the store and the local copies of this process
documents.py        JSON that is stored next to artifacts
code_digest.py      the digest of the sources that a task imports
result_records.py   the record by which a task's result is found again
order_records.py    the record by which a finished order is found again
outages.py          waiting while a service does not answer
policy.py           which faults are retried, and how results are cached
log_lines.py        log lines that cannot be forged
progress.py         progress and results on Prefect's pages
memory_estimate.py  the peak memory of an order, from sizes
data_parallel.py    a step in several processes, one for each device
"""
