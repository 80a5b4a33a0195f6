"""Disable the usage reports of all libraries, in every process.

Each library reads an environment variable when it is imported or initialized. ``infra/__init__.py``
therefore calls ``disable_telemetry`` before any of them. Child processes inherit the variables.
"""

import os

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",  # Prefect's client
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",  # Great Expectations
    # The published wheels of ONNX Runtime for Linux and macOS send events to Microsoft over HTTPS,
    # the first of them before its function disable_telemetry_events() can be called.
    "ORT_DISABLE_TELEMETRY": "1",
}


def disable_telemetry() -> None:
    """Set the environment variables of ``TELEMETRY_OFF``, except those that are already set."""
    for name, value in TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
