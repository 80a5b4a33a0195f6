"""The error class of ``recpress doctor``."""

from typing import ClassVar

from compressors.contracts import CodedError


class CheckFailed(CodedError):
    """A service responds, but not as expected."""

    sentences: ClassVar = {
        "store_read_only": "{root} is read ({bundles} bundle(s)) but not written: {problem}",
        "store_write_lost": "{root} does not give back what was written to {key}.",
        "answer_foreign": "{address} responds, but not as {service} does.",
        "credentials_refused": "{service} at {address} refuses the credentials ({status}).",
        "service_failed": "{service} at {address} responds with its own failure ({status}).",
        "status_unexpected": "{service} at {address} responds with {status}.",
    }
