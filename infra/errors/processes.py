"""Errors of memory, child processes, and services that fail or do not respond.

``sentences`` of a class maps the code of each error to its message, with the fields in braces (see
``infra/errors/__init__.py``).

Fields whose names do not explain them:

- ``doing``: the work, as the subject of the sentence (``Building the network``); in
  ``file_memory``, a verb such as ``read``. ``moment``: the phase of the peak, such as training.
- ``limit``: the limit that leaves the least memory, as text. ``setting``: the variable that
  replaces the limits.
- ``output``: a sentence with the last output of the process.
"""

from typing import ClassVar

from infra.errors.base import InfraError

# Remedies that several sentences contain. Without PREFECT_API_URL a command starts an embedded
# Prefect server.
_EMBEDDED = (
    "To use a server that runs already, and to avoid this wait, start one with 'prefect server "
    "start' and set PREFECT_API_URL=http://127.0.0.1:4200/api. {output}"
)
_EMBEDDED_DATA = f"Its data is in {{folder}}; PREFECT_HOME names another folder. {_EMBEDDED}"
_EXHAUSTED = (
    "End other processes, raise the memory limit or use a larger machine, then run again; "
    "'recpress explain' estimates what an order needs."
)


class OutOfMemory(InfraError):
    """There was not enough memory; the same work may succeed with more."""

    sentences: ClassVar = {
        "order_memory": "The order for {name}@{version} is estimated to use {needed_mib:,} MiB of "
        "memory in {moment}, and {available_mib:,} MiB are available within {limit}. Free memory, "
        "raise that limit or use a larger machine, then run again. To override the available "
        "memory, set {setting} to a number of MiB.",
        "step_memory": "{doing} needs about {needed_mib:,} MiB of memory, and {available_mib:,} "
        "MiB are available within {limit}. Free memory, raise that limit or use a larger machine, "
        "then run again. To override the available memory, set {setting} to a number of MiB.",
        "memory_exhausted": f"{{doing}} ran out of memory. {_EXHAUSTED}",
        "memory_limit_exhausted": "{doing} ran out of memory. {left_mib:,} MiB are left of "
        f"{{limit}}. {_EXHAUSTED}",
        "file_memory": "There is not enough memory to {doing} {path}. Raise the limit of this "
        "process (ulimit -v) or end other processes, then run again.",
        "child_killed": "{module} was killed, most likely because the machine ran out of memory. "
        "End other processes or use a larger machine, then run again. {output}",
        "reader_killed": "The process that reads {file} was killed, most likely because the "
        "machine ran out of memory. End other processes, then run again.",
        "reader_memory": "{file} could not be read with the {available_mib:.0f} MiB of memory that "
        "this process may still use. Raise its limit (ulimit -v), then run again.",
    }


class ChildFailed(InfraError):
    """A child process failed, was killed or reached its time limit."""

    sentences: ClassVar = {
        "child_timed_out": "{module} was killed at its limit of {seconds:g} s. Allow more seconds, "
        "or make the model smaller. {output}",
        "child_failed": "{module} failed with exit code {exit_code}. {output}",
        "child_signalled": "{module} was ended by the signal {signal}. {output}",
        "child_answer_unreadable": "{module} ended without a readable response. {output}",
        "child_answer_no_object": "Expected a JSON object as the response of {module}, got a "
        "{kind}.",
        "reader_not_started": "The process that inspects parquet files could not be started; it "
        "may lack memory. Raise the limits of this process (ulimit -v), or end other processes, "
        "then run again.",
        "command_failed": "'{command}' failed: {output}",
        "trainer_failed": "{trainer} ended with exit code {exit_code}; its output is above.",
    }


class ServiceFailed(InfraError):
    """A service ended, did not become ready, or reported a failure."""

    sentences: ClassVar = {
        "service_ended": "{service} ended with exit code {exit_code}. {output}",
        "services_not_ready": "Not ready after {seconds:g} s: {services}. {output}",
        "automations_not_listed": "Expected the list of automations from PREFECT_API_URL, got HTTP "
        "{status}. Check PREFECT_API_URL and PREFECT_API_AUTH_STRING.",
        "prefect_no_answer": "Expected a response of the Prefect server at {address}, got "
        "{problem}. Start it, correct PREFECT_API_URL, or unset it for the embedded server.",
        "prefect_failed": "Expected a response of the Prefect server at {address}, got a server "
        "error (HTTP {status}). Read the server's log.",
        "run_ended_by_prefect": "Prefect's server ended the run as {state}: {problem}",
        "embedded_server_not_started": "The embedded Prefect server ended with exit code "
        f"{{exit_code}} before it was ready. {_EMBEDDED_DATA}",
        "embedded_server_ended": "The embedded Prefect server ended with exit code {exit_code} "
        f"during the run. {_EMBEDDED_DATA}",
        "embedded_server_stalled": "The embedded Prefect server (process {process}) made no "
        "progress for {seconds:g} s: it used no CPU time and its database in {folder} did not "
        f"change. Run the command again. {_EMBEDDED}",
    }


class NoAnswer(InfraError):
    """A service did not respond within the time limit, or could not be connected to."""

    sentences: ClassVar = {
        "no_answer": "No answer from {address} ({problem}).",
        "no_answer_in_time": "No answer within {seconds:g} s.",
    }
