"""The two roots of all errors of ``infra``, by whether a second try can help. Types only."""

from compressors.contracts import CodedError


class InfraError(CodedError):
    """Something outside did not work this time; a retry may help."""


class Refused(CodedError):
    """What was given cannot be used; retrying will not help."""
