"""Code that all tasks share: stored documents, retries, cached results and progress.

workspace.py        opens the object store and copies its artifacts to this machine
graph_documents.py  types of the JSON documents of graphs and engines
documents.py        types of the other JSON documents that tasks store
new_report.py       builds the report of an order from the results of its tasks
code_digest.py      computes the digest of the sources that a task imports
result_records.py   stores results of tasks, so that a repeated task returns its result
order_records.py    stores results of orders, so that a repeated order returns its result
outages.py          waits while a service does not respond
task_calls.py       decides which faults are retried, and runs tasks with cached results
log_lines.py        escapes log lines so that they cannot be forged
row_progress.py     logs how many rows of a long task are done
progress.py         shows progress and results on Prefect's pages
memory_estimate.py  estimates the peak memory of an order from sizes
data_parallel.py    runs a step in several processes, one per device
"""
