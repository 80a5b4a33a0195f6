"""Disable the usage reports of all libraries, in every process.

Each library reads its variable when it is imported or initialized, so this must run first:
importing any module of ``infra`` runs it. Child processes inherit the variables.
"""

import os

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",  # Prefect's client
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",  # Great Expectations
    # The published wheels of ONNX Runtime for Linux and macOS send events to Microsoft over HTTPS.
    # Its function disable_telemetry_events() runs too late for the first of them.
    "ORT_DISABLE_TELEMETRY": "1",
}


def disable_telemetry() -> None:
    """Set the variables of ``TELEMETRY_OFF`` in this process, except those already set."""
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
