"""The error class of ``recpress doctor``.

Fields of its sentences: ``root`` is the address of the object store, ``bundles`` the number of its
bundles, ``problem`` the message of another error, and ``status`` an HTTP status.
"""

from typing import ClassVar

from compressors.contracts import CodedError


class CheckFailed(CodedError):
    """A service responds, but not as expected."""

    sentences: ClassVar = {
        "store_read_only": "{root} can be read ({bundles} bundle(s)), but not written: {problem}",
        "store_write_lost": "{root} returns other bytes than those that were written to {key}.",
        "answer_foreign": "{address} responds, but its response is not that of {service}.",
        "credentials_refused": "{service} at {address} refuses the credentials ({status}).",
        "service_failed": "{service} at {address} reports an internal error ({status}).",
        "status_unexpected": "{service} at {address} responds with HTTP status {status}.",
    }
