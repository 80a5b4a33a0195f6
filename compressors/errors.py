"""What can go wrong while compressing a model.

CompressionError       the order cannot be carried out as written; retrying will not help
├─ NothingToCompress   a step, or a pattern in it, fits no layer of this model
├─ ContractBroken      a step did not keep its contract; the step is at fault, not the order
├─ ModelRefused        the stored weights do not fit the architecture, or are not finite
├─ NotLowerable        a module has no form on this target
├─ ParityLost          the lowered graph does not compute what the module computes
└─ AuditFailed         the target's own graph is not what was ordered
"""


class CompressionError(Exception):
    """The order cannot be carried out as written; retrying will not help."""


class NothingToCompress(CompressionError):
    """A step, or a pattern in it, fits no layer of this model."""

    def __init__(self, *, step: str, wanted: str, closest: str, remedy: str) -> None:
        super().__init__(f"{step!r} needs {wanted}; this model has {closest}. {remedy}")


class ContractBroken(CompressionError):
    """A step did not keep its contract; the step is at fault, not the order."""


class ModelRefused(CompressionError):
    """The stored weights do not fit the architecture, or are not finite."""


class NotLowerable(CompressionError):
    """A module has no form on this target."""


class ParityLost(CompressionError):
    """The lowered graph does not compute what the module computes."""


class AuditFailed(CompressionError):
    """The target's own graph is not what was ordered."""
