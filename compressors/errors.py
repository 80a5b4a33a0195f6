"""What can go wrong while compressing a model.

CompressionError       the order cannot be carried out as written; retrying will not help
├─ NothingToCompress   a step, or a pattern in it, fits no layer of this model
├─ ContractBroken      a step did not keep its contract; the step is at fault, not the order
├─ ModelRefused        the stored weights do not fit the architecture, or are not finite
├─ NotLowerable        a module has no form on this target
├─ ParityLost          the lowered graph does not compute what the module computes
└─ AuditFailed         the target's own graph is not what was ordered
"""

from typing import Self


class CompressionError(Exception):
    """The order cannot be carried out as written; retrying will not help.

    Attributes:
        units: the tables and layers that are the cause, where they are known.
    """

    units: tuple[str, ...] = ()

    def caused_by(self, *units: str) -> Self:
        """The same error with the units that are its cause."""
        self.units = units
        return self


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
