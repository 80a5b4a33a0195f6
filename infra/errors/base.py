"""The two base classes of all errors of ``infra``.

The base class of an error says whether a retry may help. This module only defines classes.
"""

from compressors.contracts import CodedError


class InfraError(CodedError):
    """Something outside this process failed; a retry may help."""


class Refused(CodedError):
    """The input cannot be used; a retry will not help."""
